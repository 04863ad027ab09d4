"""The forecast of a stock: numbers worked out by hand."""

import math

import pytest

from qvpn.control.forecast import Supply, best_rate, lasts, runs_dry, stretch


@pytest.mark.parametrize(
    ("stored", "rekeys", "seconds"),
    [(42, [120.0], 84 * 60), (42, [60.0, 60.0], 42 * 30), (0, [60.0], 0), (None, [60.0], None), (42, [], None)],
)
def test_how_long_keys_last(stored: int | None, rekeys: list[float], seconds: float | None) -> None:
    assert lasts(stored, rekeys) == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("stored", "rate", "rekeys", "dry"),
    [
        (42, None, [120.0], False),
        (9, None, [120.0], True),  # 18 minutes, but fewer than ten rekeys
        (9, 0.001, [120.0], True),
        (9, 0.01, [120.0], False),  # more arrive than are used
        (59, None, [10.0], True),  # ten minutes are not there
        (61, None, [10.0], False),
        (None, None, [10.0], False),
        (0, 0.0, [], False),
    ],
)
def test_when_to_warn(stored: int | None, rate: float | None, rekeys: list[float], dry: bool) -> None:
    assert runs_dry(stored, rate, rekeys) is dry


def run(supply: Supply, minutes: float, *, step: float = 5.0, every: float = 60.0, block: int = 1) -> float:
    """A stock that gets ``block`` keys each ``every`` seconds and loses one each minute; the end's clock."""
    stored, drawn, now = 100, 0, 0.0
    while now < 60 * minutes:
        supply.note(stored, drawn, now)
        before, now = now, now + step
        stored += block * (int(now // every) - int(before // every))
        used = int((now + 1) // 60) - int((before + 1) // 60)
        stored, drawn = stored - used, drawn + used
    return now


@pytest.mark.parametrize(("every", "block"), [(30.0, 1), (60.0, 1), (120.0, 4), (7.0, 1)])
def test_arrivals_are_measured_though_keys_are_drawn_meanwhile(every: float, block: int) -> None:
    supply = Supply()
    now = run(supply, 30, every=every, block=block)
    assert supply.rate(now) == pytest.approx(block / every, rel=0.25)


def test_a_rate_needs_a_minute_and_forgets_after_ten() -> None:
    supply = Supply()
    assert supply.rate(0.0) is None
    supply.note(5, 0, 100.0)
    supply.note(65, 0, 130.0)
    assert supply.rate(159.0) is None
    assert supply.rate(160.0) == pytest.approx(1.0)
    supply.note(None, 0, 200.0)  # the source was away; what came meanwhile is not known
    supply.note(500, 0, 210.0)
    assert supply.rate(220.0) == pytest.approx(60 / 120)
    supply.note(500, 0, 800.0)
    assert supply.rate(800.0) == 0.0


def test_what_a_source_says_counts_half() -> None:
    assert best_rate(None, 2.0) == 2.0
    assert best_rate(None, None) is None
    assert best_rate(0.5, None) == 0.5
    assert best_rate(0.5, 2.0) == 1.0
    assert best_rate(1.5, 2.0) == 1.5


@pytest.mark.parametrize(
    ("stored", "rate", "rekeys", "factor"),
    [
        (1000, 0.0, [60.0], 1.0),  # nothing comes, but there is plenty
        (5, 1 / 60, [60.0], 1.0),  # as much comes as is used
        (5, 1 / 90, [60.0], 1.5),
        (5, 1 / 60, [60.0, 60.0], 2.0),
        (5, 0.0, [60.0], math.inf),
        (5, None, [60.0], math.inf),
        (None, None, [60.0], 1.0),
    ],
)
def test_epochs_move_apart_as_far_as_keys_are_short(
    stored: int | None, rate: float | None, rekeys: list[float], factor: float
) -> None:
    assert stretch(stored, rate, rekeys) == pytest.approx(factor)
