"""What ``qvpn bench rekey`` says is arithmetic on what it measured."""

from __future__ import annotations

import pytest

from qvpn.bench import rekey


def test_a_rekey_costs_what_more_of_them_take_in_a_quiet_second() -> None:
    often = rekey.Rounds(1.0, [2.0, 1.9, 2.2], [5.0, 5.1, 5.2], [35.0, 36.0, 90.0])
    rarely = rekey.Rounds(60.0, [2.0, 2.0, 2.0], [5.0, 5.0, 5.0], [5.0, 6.5, 30.0])
    more = 1 - 1 / 60
    assert rekey.cost_ms(often, rarely) == pytest.approx(30.0 / more)  # the median of 30, 29.5 and 60
    rows = rekey.table(often, rarely)
    assert rows[1] == ["1 s", "2.00 (1.90–2.20)", "5.10 (5.00–5.20)", "36.0 (35.0–90.0)"]
    assert rows[3] == [
        "the first divided by the second",
        "1.000 (0.950–1.100)",
        "1.020 (1.000–1.040)",
        f"one rekey: {30 / more:.1f} ms",
    ]
    assert len({len(row) for row in rows}) == 1
    assert rekey.plain(often, rarely)["one_rekey_cpu_ms"] == pytest.approx(30.0 / more)


def test_without_a_round_nothing_is_made_up() -> None:
    rows = rekey.table(rekey.Rounds(1.0), rekey.Rounds(60.0))
    assert rows[1][1:] == rows[2][1:] == ["–", "–", "–"]
