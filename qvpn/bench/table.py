"""Results as a Markdown table: medians with (smallest-largest), and ratios of the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvpn.bench.cases import OFTEN, OVER_QUIC, OVER_TCP, RARELY
from qvpn.bench.link import LINKS
from qvpn.bench.results import Results, Row
from qvpn.bench.stats import Spread, ratio, spread

OURS = "qvpn"
_BESIDE_QUIC = (OURS, OVER_QUIC, "openvpn", OVER_TCP)


@dataclass(frozen=True)
class Column:
    """One figure: its key in the rows, its title, digits behind the point, factor from stored to shown unit."""

    key: str
    title: str
    digits: int
    factor: float = 1.0


COLUMNS = (
    Column("tcp1_gbits", "1 stream, Gbit/s", 2),
    Column("tcp4_gbits", "4 streams, Gbit/s", 2),
    Column("udp_pps", "64-byte UDP, kpps", 0, 1e-3),
    Column("idle_us", "ping idle, µs", 0),
    Column("hot_us", "ping back to back, µs", 0),
    Column("load_p99_us", "ping under load p99, ms", 1, 1e-3),
    Column("cpu_s_per_gb", "CPU s/GB", 2),
)


def markdown(results: Results) -> str:
    """The whole page."""
    parts = [heading(results)]
    for link in results.links():
        parts.append(f"### Link `{link}`: {LINKS[link].about}\n\n{_figures(results, link)}")
        if compared := _ratios(results, link):
            parts.append(f"qvpn against each, in the same round:\n\n{compared}")
    if found := carriers(results):
        parts.append(f"### Where only QUIC or only TCP passes\n\n{found}")
    parts += [_notes(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(results: Results) -> str:
    """Where, when and how all was measured."""
    machine = results.machine
    return (
        f"Medians of {results.rounds} interleaved rounds (smallest–largest); each TCP figure is {results.seconds} s "
        f"of iperf3 with cubic, one way. All ends, senders and receivers share the machine's cores.\n\n"
        f"{machine['date']}; {machine['cpu']}, {machine['cores']} cores; kernel {machine['kernel']}; "
        f"commit {machine['commit']}; Python {machine['python']}, cryptography {machine['cryptography']}, "
        f"numpy {machine['numpy']}; load average before {machine['load']}."
    )


def _figures(results: Results, link: str) -> str:
    rows = [row for row in results.rows if row.link == link]
    columns = _used(rows)
    lines = [["tunnel", "version", "cipher", *(column.title for column in columns)]]
    for row in rows:
        shown = [_show(spread(row.series(column.key, results.rounds)), column) for column in columns]
        lines.append([row.tunnel, row.version, row.cipher, *shown])
    lines += [[name, f"absent: {why}", *["–"] * (1 + len(columns))] for name, why in _absent(results, link)]
    return grid(lines)


def _absent(results: Results, link: str) -> list[tuple[str, str]]:
    return list(results.absent.items()) if link == "default" else []


def carriers(results: Results) -> str:
    """Ours over QUIC beside ours over UDP and OpenVPN over both: throughput and the wait under load in one table.

    Empty where QUIC was not measured.
    """
    ours = results.row(OVER_QUIC, "default")
    if ours is None:
        return ""
    rows = [row for name in _BESIDE_QUIC if (row := results.row(name, "default")) is not None]
    columns = _used([ours])
    if not columns:
        return ""
    figures = [["tunnel", "version", *(column.title for column in columns)]]
    ratios = [[f"{OVER_QUIC} divided by", *(column.title.split(",")[0] for column in columns)]]
    for row in rows:
        shown = [_show(spread(row.series(column.key, results.rounds)), column) for column in columns]
        figures.append([row.tunnel, row.version, *shown])
        if row is not ours:
            ratios.append([row.tunnel, *_divided(results, ours, row, columns)])
    return "\n\n".join(grid(lines) for lines in (figures, ratios) if len(lines) > 1)


def _ratios(results: Results, link: str) -> str:
    ours = results.row(OURS, link)
    others = [row for row in results.rows if row.link == link and row.tunnel != OURS]
    if ours is None or not others:
        return ""
    columns = _used([ours])
    lines = [["qvpn divided by", *(column.title.split(",")[0] for column in columns)]]
    return grid([*lines, *([other.tunnel, *_divided(results, ours, other, columns)] for other in others)])


def _divided(results: Results, ours: Row, other: Row, columns: Sequence[Column]) -> list[str]:
    """Our figures divided by another tunnel's, round by round."""
    return [
        _show_ratio(ratio(ours.series(column.key, results.rounds), other.series(column.key, results.rounds)))
        for column in columns
    ]


def _used(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(column.key in row.figures for row in rows)]


def _show(found: Spread | None, column: Column) -> str:
    if found is None:
        return "–"
    middle, low, high = (
        f"{value * column.factor:.{column.digits}f}" for value in (found.median, found.low, found.high)
    )
    return f"{middle} ({low}–{high})" if found.count > 1 else middle


def _show_ratio(found: Spread | None) -> str:
    if found is None:
        return "–"
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})" if found.count > 1 else f"{found.median:.2f}"


def _notes(results: Results) -> str:
    notes = [f"- failed: {failure}" for failure in results.failures]
    balanced = [row for row in results.rows if any(row.counts)]
    if balanced:
        opened = sum(count.get("opened", 0) for row in balanced for count in row.counts)
        checked = sum(count.get("source_checks", 0) for row in balanced for count in row.counts)
        rekeys = sum(count.get("rekeys", 0) for row in balanced for count in row.counts)
        notes.append(
            f"- qvpn's own counters balanced after every run: {opened:,} datagrams opened and as many counters "
            f"marked in replay windows; {checked:,} packets and superpackets with their source checked and as many "
            f"given to the TUN; {rekeys} rekeys on the way."
        )
    if cost := _rekey_cost(results):
        notes.append(cost)
    return "\n".join(notes)


def _rekey_cost(results: Results) -> str | None:
    """Throughput with a rekey each second divided by that with one each minute, in the same rounds."""
    often, rarely = (results.row(name, "default") for name in (OFTEN, RARELY))
    if often is None or rarely is None:
        return None
    shares = [
        f"{_show_ratio(ratio(often.series(key, results.rounds), rarely.series(key, results.rounds)))} ({title})"
        for key, title in (("tcp1_gbits", "one stream"), ("tcp4_gbits", "four"))
    ]
    return f"- throughput with a rekey each second divided by that with one each minute: {', '.join(shares)}."


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as text; the first line is its head."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([shown[0], rule, *shown[1:]])
