"""Toeplitz hashing: the FFT against the matrix it stands for, and against exact integers."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.qkd.distill import fftw, toeplitz
from keysource.qkd.distill.toeplitz import folded, plain, rows_alone, seed_bits, smooth_length, toeplitz_hash

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def by_matrix(bits: np.ndarray, seed: np.ndarray, m: int) -> np.ndarray:
    """The matrix written out: row i, column j is seed[i - j + n - 1]."""
    n = len(bits)
    rows = np.arange(m)[:, None] - np.arange(n)[None, :] + n - 1
    return (seed[rows].astype(np.int64) @ bits.astype(np.int64) % 2).astype(np.uint8)


def by_integers(bits: np.ndarray, seed: np.ndarray, m: int) -> np.ndarray:
    """Kronecker substitution: both polynomials as integers with room for every count between the coefficients."""
    n, width = len(bits), 32
    one = sum(int(b) << (width * i) for i, b in enumerate(bits))
    other = sum(int(b) << (width * i) for i, b in enumerate(seed))
    product = one * other
    return np.array([(product >> (width * (n - 1 + i))) & 1 for i in range(m)], dtype=np.uint8)


def every_row(bits: np.ndarray, seed: np.ndarray, m: int) -> np.ndarray:
    return rows_alone(bits, seed, range(m))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_it_is_the_matrix_product(n: int, m: int, number: int) -> None:
    nature = np.random.default_rng(number)
    bits, seed = nature.integers(0, 2, n, dtype=np.uint8), nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    expected = by_matrix(bits, seed, m)
    for way in (toeplitz_hash, folded, plain, every_row):
        assert (way(bits, seed, m) == expected).all(), way


KINDS = ["random", "ones", "only the key", "only the seed"]


def sample(kind: str, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Ones are the worst: every count is as large as it can be."""
    nature = np.random.default_rng(3)
    bits, seed = nature.integers(0, 2, n, dtype=np.uint8), nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    if kind in ("ones", "only the key"):
        bits[:] = 1
    if kind in ("ones", "only the seed"):
        seed[:] = 1
    return bits, seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [6000, 6001])
def test_at_real_sizes_it_is_the_exact_integer_product(kind: str, n: int) -> None:
    bits, seed = sample(kind, n, 1500)
    expected = by_integers(bits, seed, 1500)
    for way in (toeplitz_hash, folded, plain):
        assert (way(bits, seed, 1500) == expected).all(), way


def test_a_window_of_a_large_hash_matches_rows_worked_out_alone() -> None:
    nature = np.random.default_rng(4)
    n, m = 700_000, 120_000
    bits, seed = nature.integers(0, 2, n, dtype=np.uint8), nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    quick, rows = toeplitz_hash(bits, seed, m), (0, 1, 63_211, m - 1)
    for row, alone in zip(rows, rows_alone(bits, seed, rows).tolist(), strict=True):
        slow = np.bitwise_xor.reduce(seed[row : row + n][::-1] & bits)
        assert quick[row] == slow == alone


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_agree_at_the_size_of_a_block(kind: str) -> None:
    bits, seed = sample(kind, 300_001, 90_000)
    expected = plain(bits, seed, 90_000)
    assert (folded(bits, seed, 90_000) == expected).all()
    assert (toeplitz_hash(bits, seed, 90_000) == expected).all()
    if fftw.HERE:
        found = fftw.centred(bits, seed, 90_000, toeplitz.MAX_RESIDUAL)
        assert found is None or (found == expected).all()
        assert found is not None or kind != "random"


@pytest.mark.skipif(not LONG, reason="seconds of Fourier transforms: QVPN_TEST_LONG=1")
@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_key_that_is_folded_is_folded_exactly(kind: str) -> None:
    n, m = toeplitz.LONGEST_FOLDED, 1 << 20
    bits, seed = sample(kind, n, m)
    assert (folded(bits, seed, m) == plain(bits, seed, m)).all()


def test_it_is_linear_so_two_keys_collide_as_their_difference_hashes_to_zero() -> None:
    nature = np.random.default_rng(5)
    n, m = 500, 100
    a, b = nature.integers(0, 2, (2, n), dtype=np.uint8)
    seed = nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    assert (toeplitz_hash(a ^ b, seed, m) == toeplitz_hash(a, seed, m) ^ toeplitz_hash(b, seed, m)).all()


def test_keys_that_differ_in_one_bit_collide_as_often_as_they_may() -> None:
    """2-universal: over seeds, an 8-bit hash of a fixed difference is zero once in 256."""
    nature = np.random.default_rng(6)
    n, m, trials = 40, 8, 40_000 if LONG else 8_000
    difference = np.zeros(n, dtype=np.uint8)
    difference[[3, 17, 39]] = 1
    zero = sum(
        not toeplitz_hash(difference, nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8), m).any()
        for _ in range(trials)
    )
    expected = trials / 256
    assert abs(zero - expected) < 5 * expected**0.5


@pytest.mark.parametrize("shift", [-0.3, 0.3, 0.5, float("nan")])
def test_an_fft_that_is_not_exact_is_noticed(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = np.fft.irfft
    monkeypatch.setattr(toeplitz.fftw, "HERE", False)
    monkeypatch.setattr(toeplitz, "LONGEST_FOLDED", 1000)
    for n in (1000, 1001):
        bits, seed = sample("random", n, 500)
        scale = 2.0 ** max(1, (4 * int(bits[: n // 2].sum()) - 1).bit_length()) if n == 1000 else 1.0
        monkeypatch.setattr(toeplitz.np.fft, "irfft", lambda *args, by=scale: honest(*args) + by * shift)
        with pytest.raises(ArithmeticError, match="residual"):
            toeplitz_hash(bits, seed, 500)


def test_a_convolution_that_is_wrong_by_a_whole_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No residual shows that; the rows that are worked out alone do."""
    honest = toeplitz.plain
    monkeypatch.setattr(toeplitz.fftw, "HERE", False)
    monkeypatch.setattr(toeplitz, "LONGEST_FOLDED", 10)
    monkeypatch.setattr(toeplitz, "plain", lambda *args: honest(*args) ^ 1)
    with pytest.raises(ArithmeticError, match="single rows"):
        toeplitz_hash(*sample("random", 1000, 500), 500)


@pytest.mark.skipif(not fftw.HERE, reason="needs the extra fast")
def test_where_float32_is_not_exact_float64_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, seed = sample("random", 5000, 2000)
    expected = plain(bits, seed, 2000)
    assert fftw.centred(bits, seed, 2000, 1e-9) is None
    monkeypatch.setattr(toeplitz.fftw, "centred", lambda *_: None)
    assert (toeplitz_hash(bits, seed, 2000) == expected).all()


def test_wrong_seed_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="seed bits"):
        toeplitz_hash(np.ones(10, dtype=np.uint8), np.ones(13, dtype=np.uint8), 5)


@given(st.integers(1, 10**7))
def test_smooth_length_is_smooth_and_enough(least: int) -> None:
    length = smooth_length(least)
    assert least <= length < 2 * least
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    assert length == 1
