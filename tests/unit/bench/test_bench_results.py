"""From rounds to medians, ratios, table and chart."""

import xml.etree.ElementTree as ElementTree

import pytest

from qvpn.bench import results, stats
from qvpn.bench.chart import svg
from qvpn.bench.results import Results, Row
from qvpn.bench.table import markdown

MACHINE = {
    "date": "2026-01-01 00:00 UTC",
    "cpu": "Example 9000",
    "cores": "2",
    "kernel": "6.18",
    "commit": "0123456789",
    "python": "3.11",
    "cryptography": "50",
    "numpy": "2",
    "load": "0.00 0.00 0.00",
}


def example() -> Results:
    found = Results(dict(MACHINE), rounds=3, seconds=2)
    ours = Row("qvpn", "default", "AES-256-GCM", "0.1.0")
    other = Row("openvpn", "default", "AES-256-GCM", "2.6")
    for number, (mine, theirs) in enumerate(((6.0, 1.0), (8.0, 2.0), (3.0, 0.5))):
        ours.note(number, {"tcp1_gbits": mine, "udp_pps": 300_000 + number})
        ours.counts.append({"opened": 10, "marked": 10, "source_checks": 5, "rekeys": 1})
        other.note(number, {"tcp1_gbits": theirs} if number != 1 else {})
    found.rows += [ours, other]
    return found


def test_a_ratio_is_taken_within_each_round() -> None:
    """The medians' ratio would be 6; a slow round must not be compared with a fast one."""
    spread = stats.ratio([6.0, 8.0, 3.0], [1.0, 2.0, 0.5])
    assert spread == stats.Spread(6.0, 4.0, 6.0, 3)
    assert stats.ratio([10.0, 20.0, 90.0], [10.0, 40.0, 30.0]) == stats.Spread(1.0, 0.5, 3.0, 3)


def test_rounds_without_a_figure_are_left_out() -> None:
    assert stats.spread([None, 2.0, None, 4.0]) == stats.Spread(3.0, 2.0, 4.0, 2)
    assert stats.spread([None, None]) is None
    assert stats.ratios([1.0, None, 3.0], [2.0, 5.0, None]) == [0.5]
    assert stats.ratio([1.0], [0.0]) is None


def test_a_late_figure_does_not_slip_into_an_earlier_round() -> None:
    row = Row("x", "default", "", "")
    row.note(0, {"a": 1.0})
    row.note(1, {})
    row.note(2, {"a": 3.0, "b": 9.0})
    assert row.series("a", 4) == [1.0, None, 3.0, None]
    assert row.series("b", 4) == [None, None, 9.0, None]
    assert row.series("never", 2) == [None, None]


def test_the_table_says_what_was_measured_where_and_what_was_absent() -> None:
    found = example()
    found.absent["tinc"] = "tincd not installed"
    found.failures.append("openvpn@default, round 2: it ended")
    text = markdown(found)
    for part in ("Example 9000", "2 cores", "0123456789", "3 interleaved rounds", "cubic", "tincd not installed"):
        assert part in text
    assert "| 6.00 (3.00–8.00)" in text
    assert "| 0.75 (0.50–1.00)" in text
    assert "failed: openvpn@default, round 2: it ended" in text
    assert "30 datagrams opened" in text
    assert "3 rekeys" in text
    ratios = next(line for line in text.splitlines() if line.startswith("| openvpn") and "AES" not in line)
    assert "6.00 (6.00–6.00)" in ratios
    assert "fastest" not in text.lower()


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    found = example()
    found.absent["tinc"] = "tincd not installed"
    for block in markdown(found).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_the_cost_of_a_rekey_is_a_ratio_of_two_rows() -> None:
    found = example()
    for name, figures in (("qvpn rekey 1s", (9.0, 4.0, 6.0)), ("qvpn rekey 60s", (10.0, 4.0, 5.0))):
        row = Row(name, "default", "AES-256-GCM", "0.1.0")
        for number, figure in enumerate(figures):
            row.note(number, {"tcp1_gbits": figure, "tcp4_gbits": figure * 2})
        found.rows.append(row)
    assert "each minute: 1.00 (0.90–1.20) (one stream), 1.00 (0.90–1.20) (four)" in markdown(found)
    assert "rekey 1s" not in svg(found)


def test_json_round_trip() -> None:
    found = example()
    assert results.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="schema"):
        results.from_json(found.to_json().replace('"schema": 1', '"schema": 2'))


def test_the_charts_bars_are_as_long_as_their_figures() -> None:
    tree = ElementTree.fromstring(svg(example()))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", "0")) for bar in tree.iter(f"{space}rect")][1:]
    assert len(bars) == 3
    assert bars[0] / bars[1] == pytest.approx(6.0 / 0.75, rel=0.01)
    texts = [text.text or "" for text in tree.iter(f"{space}text")]
    assert "6.00" in texts
    assert any("Example 9000" in text for text in texts)
    assert "openvpn 2.6" in texts, "which build it was"


def test_a_chart_of_nothing_is_still_a_picture() -> None:
    ElementTree.fromstring(svg(Results(dict(MACHINE), 1, 1)))


def test_quic_stands_beside_udp_and_tcp_with_throughput_and_the_wait_under_load_in_one_table() -> None:
    found = example()
    assert "Where only QUIC" not in markdown(found)
    for name, bits, wait in (
        ("qvpn over quic", (0.4, 0.2, 0.3), 8000.0),
        ("openvpn over tcp", (0.2, 0.4, 0.1), 16e3),
    ):
        row = Row(name, "default", "AES-256-GCM", f"version of {name}")
        for number, figure in enumerate(bits):
            row.note(number, {"tcp1_gbits": figure, "load_p99_us": wait})
        found.rows.append(row)
    text = markdown(found).partition("### Where only QUIC or only TCP passes\n")[2]
    figures, ratios = text.strip().split("\n\n")[:2]
    assert [line.split("|")[1].strip() for line in figures.splitlines()[2:]] == [
        "qvpn", "qvpn over quic", "openvpn", "openvpn over tcp"
    ]  # fmt: skip
    assert "| 0.30 (0.20–0.40)" in figures and "| 8.0 (8.0–8.0)" in figures and "| 16.0 (16.0–16.0)" in figures
    (line,) = (line for line in ratios.splitlines() if line.startswith("| openvpn over tcp"))
    assert "| 2.00 (0.50–3.00)" in line and "| 0.50 (0.50–0.50)" in line
