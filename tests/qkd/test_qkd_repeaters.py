"""Waiting times and fidelities: closed forms against published values, the simulation against the closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from keysource.qkd.cli import app
from keysource.qkd.repeaters import (
    Chain,
    bbpssw,
    dejmps,
    dephased,
    direct,
    key_of_werner,
    nested_rounds,
    swapped,
    trusted_chain,
    waiting_rounds,
)


@pytest.mark.parametrize(("links", "values"), [
    (1, (10, 100, 1000)),
    (2, (14.736842, 149.748744, 1499.749875)),
    (4, (20.273378, 207.789922, 2082.791493)),
    (8, (26.295784, 270.924509, 2716.997988)),
])  # fmt: skip
def test_expected_waiting(links: int, values: tuple[float, ...]) -> None:
    for p, value in zip((0.1, 0.01, 0.001), values, strict=True):
        assert waiting_rounds(links, p) == pytest.approx(value, rel=1e-7)
    if links == 2:
        assert waiting_rounds(2, 0.1) == pytest.approx((3 - 0.2) / (0.1 * 1.9))
        assert waiting_rounds(2, 1e-5) == pytest.approx(nested_rounds(1, 1e-5, 1.0), rel=1e-4)


@given(st.integers(1, 40), st.floats(0.01, 0.9))
def test_waiting_grows_with_links_and_both_ways_of_summing_agree(links: int, p: float) -> None:
    rounds = waiting_rounds(links, p)
    assert rounds <= waiting_rounds(links + 1, p) and 1 / p * (1 - 1e-12) <= rounds
    slow = sum(1 - (1 - (1 - p) ** k) ** links for k in range(6000))
    assert rounds == pytest.approx(slow, rel=1e-6)


def test_memories_forget() -> None:
    assert dephased(1.0, 0.1, 1.0) == pytest.approx(0.952419, abs=1e-6)
    assert dephased(1.0, 0.1, 1.0, memories=2) == pytest.approx(0.909365, abs=1e-6)
    assert dephased(1.0, 1e6, 1.0) == pytest.approx(0.5)


def test_swapping_and_purifying() -> None:
    """Published values."""
    assert swapped(0.9, 0.9) == pytest.approx(0.813333, abs=1e-6)
    assert swapped(swapped(0.9, 0.9), swapped(0.9, 0.9)) == pytest.approx(0.673126, abs=1e-6)
    assert swapped(0.95, 0.95) == pytest.approx(0.903333, abs=1e-6)
    for f, after, p in ((0.75, 0.788462, 0.722222), (0.8, 0.838150, 0.768889), (0.9, 0.926396, 0.875556)):
        assert bbpssw(f) == pytest.approx((after, p), abs=1e-6)
    for f, once, twice in ((0.9, 0.926396, 0.988764), (0.75, 0.788462, 0.902361)):
        g = (1 - f) / 3
        first, p = dejmps((f, g, g, g))
        assert first[0] == pytest.approx(once, abs=1e-6) and p == pytest.approx(bbpssw(f)[1])
        assert dejmps(first)[0][0] == pytest.approx(twice, abs=1e-6) and sum(first) == pytest.approx(1)


def test_swapping_by_density_matrices() -> None:
    """The slow model: four qubits, a Bell measurement on the inner two, Phi+ found."""
    phi = np.zeros((2, 2))
    phi[0, 0] = phi[1, 1] = math.sqrt(0.5)
    pure = np.outer(phi.ravel(), phi.ravel())

    def werner(f: float) -> np.ndarray:
        w = (4 * f - 1) / 3
        return w * pure + (1 - w) * np.eye(4) / 4

    for a, b in ((0.9, 0.9), (0.95, 0.7), (1.0, 0.8)):
        both = np.kron(werner(a), werner(b)).reshape((2,) * 8)
        out = np.einsum("abcdefgh,bc,fg->adeh", both, phi, phi).reshape(4, 4)
        out = out / np.trace(out)
        assert float(phi.ravel() @ out @ phi.ravel()) == pytest.approx(swapped(a, b), abs=1e-12)


def test_key_of_a_werner_pair() -> None:
    assert key_of_werner(0.9) == pytest.approx(0.293281, abs=1e-6)
    assert key_of_werner(0.834957) == 0.0 < key_of_werner(0.83497)


@pytest.mark.parametrize("links", [1, 2, 4])
def test_the_simulation_has_the_waits_and_fidelities_of_the_closed_forms(links: int) -> None:
    chain, pairs = Chain(200.0, links, parallel=20, t2=1e9), 40_000
    seconds, fidelity = chain.simulate(pairs, np.random.default_rng(links))
    assert abs(seconds.mean() - chain.seconds()) < 4 * seconds.std() / math.sqrt(pairs)
    expected = chain.fidelity
    for _ in range(links - 1):
        expected = swapped(expected, chain.fidelity)
    assert np.allclose(fidelity, expected, atol=1e-6), "memories that never forget: swapping alone"


def test_dephasing_in_the_simulation_is_that_of_waiting_memories() -> None:
    """Two links: the first to come waits D rounds, and E[z^D] of two geometric waits has a closed form."""
    chain = Chain(100.0, 2, fidelity=1.0, t2=0.002, parallel=4)
    p, z = chain.success, math.exp(-2 * chain.round_seconds / chain.t2)
    survive = p / (2 - p) * (1 + 2 * (1 - p) * z / (1 - (1 - p) * z))
    _seconds, fidelity = chain.simulate(200_000, np.random.default_rng(5))
    expected = (2 + 2 * survive) / 4
    assert abs(fidelity.mean() - expected) < 4 * fidelity.std() / math.sqrt(200_000)
    assert fidelity.min() >= 0.5


def test_more_memories_help_and_bad_ones_do_not() -> None:
    nature = np.random.default_rng(6)
    base = Chain(400.0, 4, fidelity=0.99, t2=10.0, parallel=1)
    many = replace(base, parallel=50)
    assert many.seconds() < base.seconds() / 20
    assert many.key_rate(2000, nature) > 0 == replace(many, t2=1e-4).key_rate(2000, nature)


def test_when_a_chain_beats_what_no_direct_transmission_passes() -> None:
    """PLOB falls with all of the distance, the chain with one link of it: at 1 GHz it wins somewhere past 200 km."""
    nature = np.random.default_rng(7)

    def wins(km: float) -> bool:
        chain = Chain(km, 8, efficiency=0.9, fidelity=0.995, t2=100.0, parallel=1000)
        return chain.key_rate(1000, nature) > direct(km, 1e9)

    assert not wins(200) and wins(1000)
    assert trusted_chain(800, 8, 1e9) == pytest.approx(direct(100, 1e9)), "trusted nodes win, and see every key"


def test_the_command_shows_where_the_chain_wins() -> None:
    answer = json.loads(CliRunner().invoke(app, ["repeater", "--to", "1000", "--step", "200", "--json"]).stdout)
    chain, plob, nodes = (np.array(rates) for rates in answer["rates"].values())
    assert answer["km"] == [200, 400, 600, 800, 1000]
    assert chain[0] < plob[0] and chain[-1] > plob[-1] and (nodes > chain).all()
