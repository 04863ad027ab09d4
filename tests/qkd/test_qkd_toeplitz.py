"""Toeplitz hashing: the FFT against the matrix it stands for, and against exact integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.qkd.distill import toeplitz
from keysource.qkd.distill.toeplitz import seed_bits, smooth_length, toeplitz_hash


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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_it_is_the_matrix_product(n: int, m: int, number: int) -> None:
    nature = np.random.default_rng(number)
    bits, seed = nature.integers(0, 2, n, dtype=np.uint8), nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    assert (toeplitz_hash(bits, seed, m) == by_matrix(bits, seed, m)).all()


@pytest.mark.parametrize("kind", ["random", "ones"])
def test_at_real_sizes_it_is_the_exact_integer_product(kind: str) -> None:
    nature = np.random.default_rng(3)
    n, m = 6000, 1500
    bits = nature.integers(0, 2, n, dtype=np.uint8) if kind == "random" else np.ones(n, dtype=np.uint8)
    seed = nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    seed = seed if kind == "random" else np.ones_like(seed)
    assert (toeplitz_hash(bits, seed, m) == by_integers(bits, seed, m)).all()


def test_a_window_of_a_large_hash_matches_rows_worked_out_alone() -> None:
    nature = np.random.default_rng(4)
    n, m = 700_000, 120_000
    bits, seed = nature.integers(0, 2, n, dtype=np.uint8), nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    quick = toeplitz_hash(bits, seed, m)
    for row in (0, 1, 63_211, m - 1):
        slow = np.bitwise_xor.reduce(seed[row : row + n][::-1] & bits)
        assert quick[row] == slow


def test_it_is_linear_so_two_keys_collide_as_their_difference_hashes_to_zero() -> None:
    nature = np.random.default_rng(5)
    n, m = 500, 100
    a, b = nature.integers(0, 2, (2, n), dtype=np.uint8)
    seed = nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8)
    assert (toeplitz_hash(a ^ b, seed, m) == toeplitz_hash(a, seed, m) ^ toeplitz_hash(b, seed, m)).all()


def test_keys_that_differ_in_one_bit_collide_as_often_as_they_may() -> None:
    """2-universal: over seeds, an 8-bit hash of a fixed difference is zero once in 256."""
    nature = np.random.default_rng(6)
    n, m, trials = 40, 8, 20_000
    difference = np.zeros(n, dtype=np.uint8)
    difference[[3, 17, 39]] = 1
    zero = sum(
        not toeplitz_hash(difference, nature.integers(0, 2, seed_bits(n, m), dtype=np.uint8), m).any()
        for _ in range(trials)
    )
    expected = trials / 256
    assert abs(zero - expected) < 5 * expected**0.5


def test_an_fft_that_is_not_exact_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = np.fft.irfft
    monkeypatch.setattr(toeplitz.np.fft, "irfft", lambda *args: honest(*args) + 0.2)
    with pytest.raises(ArithmeticError, match="residual"):
        toeplitz_hash(np.ones(100, dtype=np.uint8), np.ones(149, dtype=np.uint8), 50)


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
