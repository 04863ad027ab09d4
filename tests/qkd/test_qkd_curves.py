"""Rates against published and independently computed tables, the order that never breaks, the optimiser, Eve's
delay."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from keysource.qkd.cli import app
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.entangled import PairOptics
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates import tomamichel, twodecoy
from keysource.qkd.rates.asymptotic import (
    Channel,
    MaChannel,
    Pairs,
    ThresholdChannel,
    gys,
    infinite_decoys,
    no_decoys,
    one_decoy,
    one_node,
    plob,
    two_decoys,
    vacuum_and_weak,
)
from keysource.qkd.rates.curves import ANALYSES, Curve
from keysource.qkd.rates.detection import bits_until_alarm, expected_bits
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.expected import one_decoy_finite
from keysource.qkd.rates.finite import Decoy, Security, gamma_serfling
from keysource.qkd.rates.lim2014 import Line, Settings, Three, evaluate, relative
from keysource.qkd.rates.optimise import maximise
from keysource.qkd.rates.proofs import judge, secret_bits
from keysource.qkd.rates.twodecoy import TwoDecoy

# Gobby/Yuan/Shields as in Ma 2005: alpha .21, e_d .033, Y0 1.7e-6, eta_Bob .045, f 1.22, mu .48


@pytest.mark.parametrize(("km", "infinite", "gain", "error", "weak"), [
    (0, 2.5546e-3, 2.1370e-2, 0.0330, 2.4142e-3),
    (20, 9.6245e-4, 8.1802e-3, 0.0331, 9.0777e-4),
    (100, 1.7184e-5, 1.7326e-4, 0.0376, 1.6020e-5),
    (120, 4.8146e-6, 6.6929e-5, 0.0449, 4.3686e-6),
    (140, 2.4647e-7, 2.6500e-5, 0.0630, 7.3779e-8),
])  # fmt: skip
def test_gys_rates(km: float, infinite: float, gain: float, error: float, weak: float) -> None:
    channel = gys(km)
    assert channel.gain(0.48) == pytest.approx(gain, rel=1e-4)
    assert channel.error_gain(0.48) / channel.gain(0.48) == pytest.approx(error, abs=6e-5)
    assert infinite_decoys(channel, 0.48, f=1.22) == pytest.approx(infinite, rel=1e-4)
    assert vacuum_and_weak(channel, 0.48, 0.05, f=1.22) == pytest.approx(weak, rel=1e-4)


def reach(rate, low: float, high: float) -> float:  # type: ignore[no-untyped-def]
    """The last distance with a key, by bisection."""
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > 0 else (low, middle)
    return low


def test_gys_maximum_distances() -> None:
    assert reach(lambda km: infinite_decoys(gys(km), 0.48, f=1.22), 100, 200) == pytest.approx(142.015, abs=2e-3)
    assert reach(lambda km: vacuum_and_weak(gys(km), 0.48, 0.05, f=1.22), 100, 200) == pytest.approx(
        140.619, abs=2e-3
    )
    assert reach(lambda km: vacuum_and_weak(gys(km), 0.48, 0.01, f=1.22), 100, 200) == pytest.approx(
        141.744, abs=2e-3
    )

    def without(km: float) -> float:
        return max(no_decoys(gys(km), gys(km).eta * k / 200, f=1.22) for k in range(1, 400))

    assert reach(without, 20, 80) == pytest.approx(40.206, abs=0.02)


def test_the_best_intensity_at_short_distance() -> None:
    """(1 - mu) e^-mu = f h(e_d) / (1 - h(e_d)): 0.4789 and 0.5441."""
    for f, expected in ((1.22, 0.4789), (1.0, 0.5441)):
        h = binary_entropy(0.033)
        cost = f * h / (1 - h)
        mu = reach(lambda mu, cost=cost: (1 - mu) * math.exp(-mu) - cost, 0.01, 0.99)  # type: ignore[misc]
        assert mu == pytest.approx(expected, abs=1e-4)
        # and that is where the rate is largest once dark counts do not matter and the fibre is long
        quiet = MaChannel(1e-4, 1e-12, 0.033)
        (found,), _rate = maximise(lambda p: infinite_decoys(quiet, p[0], f=f), [(0.01, 1.5)], [(0.3,)])  # noqa: B023
        assert found == pytest.approx(expected, abs=2e-3)


def standard(km: float) -> ThresholdChannel:
    """Parameters of a published package's anchor curves: eta .1, p_d 6e-7, e_d .005, .2 dB/km."""
    return ThresholdChannel(Optics(Decoy(0.5, 0.1, 0.5), 0.5, km, 0.2, 0.1, 6e-7, 0.005, 1e9))


@pytest.mark.parametrize(("km", "rate", "bbm92"), [
    (0, 0.02672924, 5.340484e-4),
    (50, 0.002663555, 5.180167e-5),
    (100, 2.620111e-4, 5.125494e-6),
    (150, 2.252191e-5, 5.099995e-7),
    (200, 1.152910e-7, 5.066397e-8),
])  # fmt: skip
def test_anchor_curves_of_a_published_package(km: float, rate: float, bbm92: float) -> None:
    """Threshold detectors with random double clicks, infinite decoys, no sifting factor, f = 1."""
    assert infinite_decoys(standard(km), 0.5, f=1.0, q=1.0, vacuum=True) == pytest.approx(rate, rel=1e-6)
    half = 10 ** (-0.2 * km / 2 / 10) * 0.1
    assert Pairs(0.1, half, half, 6e-7, 6e-7, 0.005).rate(f=1.0, q=1.0) == pytest.approx(bbm92, rel=1e-6)


def test_yields_are_those_of_the_gain() -> None:
    """Q_mu = sum of Poisson weights times Y_n, E_mu Q_mu likewise: checked at mu -> 0, where one photon is left."""
    channel = standard(20)
    mu = 1e-6
    y1 = (channel.gain(mu) * math.exp(mu) - channel.y0) / mu
    assert y1 == pytest.approx(channel.y1, rel=1e-4)
    e1 = (channel.error_gain(mu) * math.exp(mu) - channel.y0 / 2) / mu / channel.y1
    assert e1 == pytest.approx(channel.e1, rel=1e-3)


# Lim 2014


FIXED = Settings(Three(0.45, 0.15, 2e-4), Three(0.5, 0.35, 0.15), 0.7)


@pytest.mark.parametrize(("km", "n_x", "length", "rate", "s_x1", "s_z1", "v_z1", "phi", "leak", "e"), [
    (20, 1e6, 167749, 9.3725e-4, 5.9056e5, 9.1973e4, 6.3915e3, 0.077614, 1.9004e5, 0.024091),
    (0, 1e7, 2971826, 4.1217e-3, 6.4625e6, 1.1348e6, 4.4429e4, 0.040884, 1.8985e6, 0.024059),
    (50, 1e7, 2829663, 3.9958e-4, 6.3166e6, 1.1080e6, 4.4142e4, 0.041607, 1.9100e6, 0.024245),
    (100, 1e7, 2655110, 3.7706e-5, 6.2761e6, 1.1006e6, 4.5034e4, 0.042716, 2.0228e6, 0.026088),
    (100, 1e9, 318891748, 4.5287e-5, 6.4751e8, 1.1837e8, 3.6490e6, 0.030970, 2.0228e8, 0.026088),
])  # fmt: skip
def test_lim_2014_with_fixed_settings(
    km: float, n_x: float, length: int, rate: float, s_x1: float, s_z1: float, v_z1: float, phi: float,
    leak: float, e: float,
) -> None:  # fmt: skip
    found = evaluate(Line(km), FIXED, n_x, 1e-9, 1e-15)
    assert found.length == pytest.approx(length, abs=1.5)
    for value, expected in ((found.rate, rate), (found.s_x1, s_x1), (found.s_z1, s_z1), (found.v_z1, v_z1)):
        assert value == pytest.approx(expected, rel=1e-4)
    for value, expected in ((found.phi, phi), (found.leak, leak), (found.e_obs, e)):
        assert value == pytest.approx(expected, rel=1e-4)


def test_lim_2014_gives_nothing_and_never_less() -> None:
    found = evaluate(Line(0), FIXED, 1e5, 1e-9, 1e-15)
    assert found.length == 0 == found.rate and found.raw_length == pytest.approx(-19221, abs=2)


def best_lim(km: float, n_x: float) -> float:
    def goal(point: tuple[float, ...]) -> float:
        mu1, share, p1, split, q_x = point
        mu = Three(mu1, 2e-4 + share * (mu1 - 4e-4), 2e-4)
        chosen = Settings(mu, Three(p1, (1 - p1) * split, (1 - p1) * (1 - split)), q_x)
        found = relative(Line(km), chosen, n_x)
        return found.rate + 1e-30 * math.exp(20 * found.raw_length / n_x) if chosen.sound else 0.0

    box = [(0.1, 0.9), (0.05, 0.95), (0.02, 0.99), (0.05, 0.95), (0.2, 1.0)]
    starts = [(0.42, 0.5, 0.4, 0.7, 0.85), (0.45, 0.35, 0.75, 0.65, 0.93), (0.5, 0.5, 0.15, 0.6, 0.6)]
    return maximise(goal, box, starts, rounds=250)[1]


@pytest.mark.parametrize(("km", "n_x", "rate"), [
    (0, 1e5, 1.3076e-3), (50, 1e6, 3.0486e-4), (100, 1e7, 4.7663e-5), (100, 1e9, 8.5368e-5), (120, 1e5, 3.0440e-6),
])  # fmt: skip
def test_the_optimiser_reaches_the_tables(km: float, n_x: float, rate: float) -> None:
    found = best_lim(km, n_x)
    assert 0.999 * rate <= found <= 1.01 * rate


# Rusca 2018, its figure's parameters: 1 GHz, eta .5, p_DC 1e-8 for both detectors, 1 % errors, 100 ns


def figure(decibel: float, mu1: float, mu2: float, p1: float, p_z: float) -> Optics:
    return Optics(Decoy(mu1, mu2, p1), p_z, decibel, 1.0, 0.5, 5e-9, 0.01, 1e9, Recovery(dead_time=100e-9))


def best_rusca(decibel: float, n_z: float) -> float:
    def goal(point: tuple[float, ...]) -> float:
        mu1, share, p1, p_z = point
        optics = figure(decibel, mu1, share * mu1, p1, p_z)
        return one_decoy_finite(optics, n_z, Security(1e-9, 1e-15), "rusca2018", as_published=True) * 1e9

    box = [(0.05, 1.0), (0.05, 0.95), (0.01, 0.99), (0.1, 0.995)]
    return maximise(goal, box, [(0.45, 0.35, 0.65, 0.88), (0.3, 0.5, 0.3, 0.6)], rounds=250)[1]


@pytest.mark.parametrize(("decibel", "n_z", "bits"), [
    (0, 1e7, 5.210e6), (10, 1e5, 1.066e6), (26, 1e7, 1.2400e5), (40, 1e9, 7.706e3), (60, 1e7, 16.97),
])  # fmt: skip
def test_rusca_2018_rates_of_its_figure(decibel: float, n_z: float, bits: float) -> None:
    assert 0.999 * bits <= best_rusca(decibel, n_z) <= 1.01 * bits


# Tomamichel 2012


@pytest.mark.parametrize(("n", "k", "q", "mu", "length"), [
    (1e4, 4e3, 0.01, 0.092447, 4227.0),
    (1e5, 1e4, 0.02, 0.051823, 47055.3),
    (1e6, 3e4, 0.02, 0.028951, 562372.8),
    (1e6, 1e5, 0.03, 0.016387, 515205.1),
    (1e7, 2e5, 0.03, 0.011158, 5385802.9),
])  # fmt: skip
def test_tomamichel_lengths(n: float, k: float, q: float, mu: float, length: float) -> None:
    assert tomamichel.deviation(n, k, 1e-10) == pytest.approx(mu, rel=1e-4)
    leak = 1.1 * n * binary_entropy(q)
    assert tomamichel.length(n, k, q, leak, 1e-10, 1e-15) == pytest.approx(length, rel=1e-5)
    assert tomamichel.length(100, 100, 0.1, 0, 1e-10, 1e-15) == 0.0


# Bounds and order


@pytest.mark.parametrize(("km", "direct", "middle"), [
    (50, 0.1520031, 0.5484123), (100, 0.01449957, 0.1520031), (200, 1.442767e-4, 0.01449957),
    (400, 1.442695e-8, 1.442767e-4),
])  # fmt: skip
def test_plob(km: float, direct: float, middle: float) -> None:
    eta = 10 ** (-0.2 * km / 10)
    assert plob(eta) == pytest.approx(direct, rel=1e-6) and one_node(eta) == pytest.approx(middle, rel=1e-6)
    assert plob(1.0) == math.inf


channels = st.builds(
    lambda km, e, dark, eta: ThresholdChannel(Optics(Decoy(0.5, 0.1, 0.5), 0.5, km, 0.2, eta, dark, e, 1e9)),
    st.floats(0.0, 200.0),
    st.floats(0.0, 0.08),
    st.floats(1e-9, 1e-5),
    st.floats(0.05, 0.9),
)


@settings(max_examples=300, deadline=None)
@given(channels, st.floats(0.1, 0.9), st.floats(0.02, 0.45))
def test_fewer_decoys_never_give_more_and_plob_is_never_passed(channel: Channel, mu: float, share: float) -> None:
    nu = mu * share
    infinite = infinite_decoys(channel, mu, f=1.0, q=1.0)
    vacuum = vacuum_and_weak(channel, mu, nu, f=1.0, q=1.0)
    loose = two_decoys(channel, (mu, nu, nu * 0.1), f=1.0, q=1.0)
    single = one_decoy(channel, mu, nu, f=1.0, q=1.0)
    naive = no_decoys(channel, mu, f=1.0, q=1.0)
    tiny = 1e-12
    assert 0 <= single <= vacuum + tiny and loose <= vacuum + tiny
    assert vacuum <= infinite + tiny and naive <= infinite + tiny
    assert infinite <= plob(channel.y1)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(1e-4, 0.9), st.floats(1e-4, 0.9), st.floats(0, 0.1))
def test_pairs_give_probabilities_and_multi_pairs_give_errors(mean: float, a: float, b: float, e_d: float) -> None:
    pairs = Pairs(mean, a, b, 1e-6, 1e-6, e_d)
    gain = pairs.gain()
    assert 0 < gain < 1 and e_d * gain * 0.999 <= pairs.error_gain() <= 0.5 * gain
    l, y = mean / 2, 1e-6  # noqa: E741
    textbook = 1 - (1 - y) / (1 + a * l) ** 2 - (1 - y) / (1 + b * l) ** 2
    textbook += (1 - y) ** 2 / (1 + a * l + b * l - a * b * l) ** 2
    assert gain == pytest.approx(textbook, rel=1e-6, abs=1e-13)
    assert pairs.rate(f=1.0, q=1.0) <= gain


# Detection takes bits


@pytest.mark.parametrize(("fraction", "bits", "tolerance"), [
    (1.0, 45, 0.07), (0.25, 370, 0.02), (0.1, 1750, 0.02), (0.05, 6200, 0.02), (0.01, 135_000, 0.02),
])  # fmt: skip
def test_the_published_bits_until_an_alarm(fraction: float, bits: int, tolerance: float) -> None:
    assert expected_bits(fraction) == pytest.approx(bits, rel=tolerance)


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.1])
def test_the_delay_measured_is_the_delay_computed_and_there_are_no_false_alarms(fraction: float) -> None:
    """Wald: the mean exceeds ln(1 / alpha) / D by the overshoot, less than one step."""
    nature, expected = np.random.default_rng(1), expected_bits(fraction)
    runs = 300
    delays = []
    for _ in range(runs):
        errors = (nature.random(int(12 * expected) + 200) < 0.02 + fraction / 4).astype(np.uint8)
        delay = bits_until_alarm(errors, fraction)
        assert delay is not None
        delays.append(delay)
    spread = np.std(delays) / math.sqrt(runs)
    overshoot = math.log((0.02 + fraction / 4) / 0.02) / (20.7 / expected)
    assert expected - 4 * spread <= np.mean(delays) <= expected + overshoot + 4 * spread
    quiet = (nature.random((200, 20_000)) < 0.02).astype(np.uint8)
    assert all(bits_until_alarm(row, fraction) is None for row in quiet)


# qvpn-qkd rate


def run_rate(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["rate", *arguments])


def test_the_command_recomputes_published_points() -> None:
    gys_link = "--link gys --analysis infinite --analysis vacuum-weak --f 1.22 --from 100 --to 120 --json"
    answer = json.loads(run_rate(*shlex.split(gys_link)).stdout)
    infinite, weak = answer["rates"]["infinite"], answer["rates"]["vacuum-weak"]
    assert [row["km"] for row in infinite] == [100, 120]
    assert infinite[0]["rate"] == pytest.approx(1.7184e-5, rel=1e-3)
    assert weak[1]["rate"] == pytest.approx(4.3686e-6, rel=1e-3)
    fixed = "--analysis rusca2018 --link metro50 --mu 0.5 0.15 --p1 0.7 --p-z 0.9 --from 100 --to 100 --json"
    (row,) = json.loads(run_rate(*shlex.split(fixed)).stdout)["rates"]["rusca2018"]
    assert row["rate"] == pytest.approx(2.0261e-4, rel=1e-4)


def test_the_command_optimises_and_prints_a_table() -> None:
    plain = json.loads(run_rate("--to", "0", "--json").stdout)["rates"]
    best = json.loads(run_rate("--to", "0", "--optimise", "--json").stdout)["rates"]
    assert plain["plob"][0]["rate"] is None, "no loss, no bound; and JSON has no infinity"
    for analysis in ("wiesemann2024", "infinite"):
        assert best[analysis][0]["rate"] >= plain[analysis][0]["rate"]
    table = run_rate("--to", "40", *(word for name in ANALYSES for word in ("--analysis", name)))
    assert table.exit_code == 0 and "20" in table.stdout


@pytest.mark.parametrize("arguments", [
    "--link nowhere", "--analysis mine", "--mu 0.1 0.5", "--p-z 1.5", "--detector 2", "--from 50 --to 20",
    "--secrecy 0",
    "--link demo-bbm92 --mu 0.5 0.1", "--link demo --pairs 0.1", "--link demo --p2 0.2",
    "--link demo-bbm92 --analysis rusca2018", "--link demo-e91 --analysis two-decoys", "--mu3 0.4", "--pairs 0.9",
    "--after-pulse 0.7", "--link demo-bbm92 --after-pulse 0.02",
])  # fmt: skip
def test_a_wrong_argument_is_one_sentence(arguments: str) -> None:
    result = run_rate(*arguments.split())
    assert result.exit_code != 0 and isinstance(result.exception, LinkSettings)


def test_every_finite_curve_stays_below_the_infinite_one_with_the_same_settings() -> None:
    optics = Optics(Decoy(0.5, 0.1, 0.6), 0.8, 0.0, 0.2, 0.3, 1e-7, 0.01, 1e9)
    for km in (0, 30, 60, 90, 120):
        rates = {name: Curve(name, optics, n_z=1e8).at(km)[0] for name in ANALYSES}
        assert rates["wiesemann2024"] <= rates["rusca2018"] <= rates["infinite"] * 1.05
        assert rates["wiesemann2024"] > 0 and rates["one-decoy"] <= rates["vacuum-weak"] <= rates["infinite"]
        if km:
            assert rates["infinite"] < rates["plob"] < rates["one-node"]


@pytest.mark.parametrize(
    ("link", "proof"), [("demo-2decoy", "wiesemann2024-2decoy"), ("demo-bbm92", "tomamichel2012")]
)
def test_every_protocol_has_its_curves(link: str, proof: str) -> None:
    """The proof that delivers comes first; at the preset's distance it is what ``rates.proofs`` says."""
    answer = json.loads(run_rate("--link", link, "--from", "10", "--to", "20", "--step", "10", "--json").stdout)
    assert next(iter(answer["rates"])) == proof and "plob" in answer["rates"]
    optics = PRESETS[link].optics
    km = optics.km_a + optics.km_b if isinstance(optics, PairOptics) else optics.distance_km
    (row,) = [row for row in answer["rates"][proof] if row["km"] == km]
    n_z, n_x = 1e7, 1e7 * ((1 - optics.p_z) / optics.p_z) ** 2
    found = judge(optics.source, optics.expected(n_z, n_x), Security())
    bits = secret_bits(optics.source, found, 1.16 * n_z * binary_entropy(optics.mean_qber()), Security())
    assert row["rate"] == pytest.approx(bits / n_z * optics.sifted()[0], rel=1e-9) and row["rate"] > 0
    infinite = answer["rates"][list(answer["rates"])[1]][0 if km == 10 else 1]["rate"]
    assert row["rate"] < infinite, "finite below infinite"


def test_two_decoys_and_pairs_can_be_set_and_optimised() -> None:
    """A third intensity makes a link with two decoys; Lim's fixed point comes out of the command."""
    fixed = "--analysis lim2014 --link metro50 --mu 0.45 0.15 --mu3 2e-4 --p1 0.5 --p2 0.35 --p-z 0.7 --detector 0.1"
    fixed += " --dark 6e-7 --misalignment 0.005 --after-pulse 0.04 --from 50 --to 50 --json"
    (row,) = json.loads(run_rate(*shlex.split(fixed)).stdout)["rates"]["lim2014"]
    assert row["rate"] == pytest.approx(3.9958e-4, rel=1e-4) and row["mu3"] == 2e-4 and row["p2"] == 0.35
    for link in ("demo-2decoy", "demo-bbm92"):
        plain, best = (
            json.loads(run_rate("--link", link, "--to", "0", *more, "--json").stdout)["rates"]
            for more in ((), ("--optimise",))
        )
        for name in list(plain)[:2]:
            assert best[name][0]["rate"] >= plain[name][0]["rate"] > 0
    bright = json.loads(run_rate("--link", "demo-bbm92", "--pairs", "0.3", "--to", "0", "--json").stdout)
    assert bright["optics"]["pairs"] == 0.3


def test_the_terms_of_the_two_decoy_budget_are_those_that_its_bounds_use() -> None:
    """17 named parts fit into the 21 that are paid; the constant is hashing and one chain rule, the sampling term
    Serfling's tail at the square of a part."""
    assert sum(twodecoy.COUNTED.values()) == 17 <= twodecoy.TERMS
    security, part = Security(1e-9, 1e-15), 1e-9 / twodecoy.TERMS
    cost = 2 * math.log2(1 / (2 * part)) + math.log2(2 / part**2) + math.log2(2 / security.correctness)
    assert twodecoy.constant_cost(security) == pytest.approx(cost, abs=1e-9)
    n, k = 5e5, 4e4
    above = gamma_serfling(n, k, part)
    tail = -2 * n * k**2 * above**2 / ((n + k) * (k + 1))  # ln of Serfling's bound
    assert tail == pytest.approx(2 * math.log(part), rel=1e-9)
    decoy, counts, moved = TwoDecoy(0.6, 0.2, 0.05, 0.3, 0.4), (3e5, 1e5, 2e4), []
    for _ in range(2):
        moved.append(twodecoy.single_lower(decoy, counts, part))
        counts = (counts[0] + 1.0, *counts[1:])
    assert moved[1] < moved[0], "more signal, less that must be single: its deviation counts upwards only"


def test_a_plot_is_written_or_the_missing_library_is_named(tmp_path: Path) -> None:
    result = run_rate("--to", "60", "--plot", str(tmp_path / "rate.png"))
    if importlib.util.find_spec("matplotlib") is None:
        assert isinstance(result.exception, LinkSettings) and "matplotlib" in str(result.exception)
    else:
        assert (tmp_path / "rate.png").stat().st_size > 10_000
