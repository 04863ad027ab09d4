"""The forecast of a stock: numbers worked out by hand."""

import pytest

from qvpn.control.forecast import lasts, runs_dry


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
