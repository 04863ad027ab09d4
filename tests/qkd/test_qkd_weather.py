"""Weather as time series, the satellite's pass, monitors on an honest link, the record format."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qkd_bench import OPTICS

from keysource.qkd.errors import BadFrame
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.monitors import TEST_SHARE, Readings, alarm, expected_share
from keysource.qkd.optics.sampler import Detections, detect, join
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.optics.weather import WEATHERS, Pass, Sky, Weather
from keysource.qkd.presets import PRESETS
from keysource.qkd.records import (
    RecordedSettings,
    detections_untrusted,
    encode_detections,
    encode_settings,
    settings_untrusted,
)


def test_drift_has_the_variance_and_the_memory_that_its_process_says() -> None:
    """Stationary standard deviation and autocorrelation exp(-t / time) of an Ornstein-Uhlenbeck walk."""
    sky, nature = Sky(Weather(drift=0.1, drift_time=10.0)), np.random.default_rng(1)
    turns = np.empty(40_000)
    for i in range(len(turns)):
        sky.step(2.0, nature)
        turns[i] = sky._turn
    assert turns.std() == pytest.approx(0.1, rel=0.03)
    assert np.corrcoef(turns[:-5], turns[5:])[0, 1] == pytest.approx(math.exp(-1.0), abs=0.03)


def test_the_sun_comes_and_goes_and_raises_the_error_ratio() -> None:
    sky, nature = Sky(Weather(background=1e-3, day=24.0)), np.random.default_rng(1)
    darks = []
    for _hour in range(24):
        darks.append(sky.over(OPTICS).dark)
        sky.step(1.0, nature)
    assert darks[0] == OPTICS.dark == darks[23] and max(darks) == darks[12] == pytest.approx(OPTICS.dark + 1e-3)
    assert OPTICS.changed(dark=1e-3).mean_qber() > OPTICS.mean_qber()


def test_calm_weather_is_no_change_and_drift_only_ever_adds_errors() -> None:
    nature = np.random.default_rng(2)
    for name, weather in WEATHERS.items():
        sky = Sky(weather)
        for _ in range(200):
            sky.step(7.0, nature)
            now = sky.over(OPTICS)
            assert now.misalignment >= OPTICS.misalignment - 1e-12 and 0 < now.detector <= 1 and now.dark < 1
            assert now == OPTICS or name != "calm"


def test_the_pass_has_the_geometry_of_its_orbit() -> None:
    """500 km: 90 degrees are 500 km away, the horizon is sqrt(h^2 + 2 R h); higher is nearer and brighter."""
    flight = Pass(altitude_km=500.0, top_deg=90.0, least_deg=10.0)
    assert flight.distance_km(90.0) == pytest.approx(500.0)
    assert flight.distance_km(0.0) == pytest.approx(math.sqrt(500.0**2 + 2 * 6371.0 * 500.0))
    assert flight.elevation(0.0) == pytest.approx(90.0, abs=1e-6)
    assert flight.elevation(flight.seconds() / 2) == pytest.approx(10.0, abs=1e-6)
    assert flight.elevation(-100.0) == pytest.approx(flight.elevation(100.0))
    losses = [flight.loss_db(e) for e in (10, 20, 40, 60, 90)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(flight.zenith_loss_db)
    assert 350 < Pass(least_deg=10.0).seconds() < 600, "a pass of a low orbit takes minutes"


def test_the_satellite_preset_gives_one_block_of_key_a_pass() -> None:
    preset = PRESETS["satellite"]
    plan = preset.plan()
    assert plan.length > 0 and plan.pulses < 2**32 and 200 < preset.block_seconds < 400
    stretches = preset.optics.stretches()
    assert len(stretches) == 30
    gains = [part.mean_gain() for _share, part in stretches]
    assert max(gains) > 3 * min(gains) and gains[0] == pytest.approx(gains[-1])
    assert preset.optics.mean_gain() == pytest.approx(np.mean(gains))


def honest(optics, test: float, seed: int = 3) -> tuple[Detections, ReceiverSeed]:  # type: ignore[no-untyped-def]
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z, test)
    nature = np.random.default_rng(seed)
    spans = ((0, 300_000), (300_000, 300_000))
    return join([detect(optics, source, bob, span, Eve(), nature) for span in spans]), bob


def test_monitors_are_quiet_on_an_honest_link_and_test_gates_are_no_key() -> None:
    optics = replace(OPTICS, distance_km=5.0)
    for seed in range(5):
        seen, bob = honest(optics, TEST_SHARE, seed)
        assert seen.readings is not None and alarm("both", seen.readings, optics) is None
        assert not bob.both(seen.positions)[1].any()
        assert seen.readings.tested == seen.readings.clicks - len(seen.positions) > 0
        share = expected_share(optics)
        assert abs(seen.readings.tested - seen.readings.clicks * share) < 5 * math.sqrt(seen.readings.clicks * share)
    for preset in PRESETS.values():
        rate = preset.optics.mean_gain() * preset.optics.pulse_rate
        assert alarm("photocurrent", Readings(1, 0, rate * 1.6e-13, 1.0), preset.optics) is None


@pytest.mark.parametrize("bases", [False, True])
def test_records_come_back(bases: bool) -> None:
    seen, bob = honest(OPTICS, 0.0)
    if bases:
        seen = replace(seen, bases=bob.at(seen.positions))
    again = detections_untrusted(encode_detections(seen, 600_000), 600_000)
    assert (again.positions == seen.positions).all() and (again.bits == seen.bits).all()
    assert again.readings == seen.readings and again.notes is None
    assert (again.bases is None) == (not bases) and (not bases or (again.bases == seen.bases).all())
    with pytest.raises(BadFrame, match="600000 pulses"):
        detections_untrusted(encode_detections(seen, 600_000), 600_001)


def test_a_settings_record_is_the_settings() -> None:
    source, where = SourceSeed(fresh_seed(), 0.7, 0.4), np.arange(1003, dtype=np.uint64)
    chosen = source.at(where)
    record = encode_settings(chosen.bit, chosen.check, chosen.decoy)
    again = settings_untrusted(record, 1003)
    assert isinstance(again, RecordedSettings)
    some = again.at(where[5::7])
    assert (some.bit == chosen.bit[5::7]).all() and (some.check == chosen.check[5::7]).all()
    assert (some.decoy == chosen.decoy[5::7]).all()
    for wrong in (record[:-1], record + b"\0", b"XXXX" + record[4:], record[:8]):
        with pytest.raises(BadFrame):
            settings_untrusted(wrong, 1003)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 30))
def test_decoders_of_records_raise_bad_frame_and_nothing_else(data: bytes, pulses: int) -> None:
    seen = Detections(np.array([1, 5], dtype=np.uint64), np.array([0, 1], dtype=np.uint8))
    good = bytearray(encode_detections(replace(seen, readings=Readings(2, 0, 0.0, 1.0)), 30))
    good[: len(data) // 2] = data[: len(data) // 2]
    for record in (data, bytes(good)):
        try:
            found = detections_untrusted(record, pulses)
            assert len(found.positions) == len(found.bits)
        except BadFrame:
            pass
        with contextlib.suppress(BadFrame):
            settings_untrusted(record, pulses)
