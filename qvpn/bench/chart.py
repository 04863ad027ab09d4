"""The results as one SVG: bars of the default link, a panel per figure, the spread of the rounds on each bar.

Written by hand instead of with a plotting library: six panels of bars are not worth a dependency.  Colours have
enough contrast on white and on black, and the background is a white card, so it reads in either theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from qvpn.bench.cases import OFTEN, RARELY
from qvpn.bench.results import Results, Row
from qvpn.bench.stats import Spread, spread
from qvpn.bench.table import OURS

_SKIPPED = ("no tunnel", OFTEN, RARELY)
_WIDTH, _PANEL_GAP, _MARGIN = 860, 26, 20
_LABEL, _BAR, _STEP, _TITLE = 130, 15, 22, 26
_VALUE = 190
"""Room for figure and cipher behind the longest bar."""
_OURS, _THEIRS, _INK, _FAINT = "#3b82f6", "#9ca3af", "#111827", "#4b5563"


@dataclass(frozen=True)
class Panel:
    """One figure.  ``better``: which way is good, said in the title."""

    key: str
    title: str
    better: str
    factor: float
    digits: int


PANELS = (
    Panel("tcp1_gbits", "TCP, one stream, Gbit/s", "more is better", 1, 2),
    Panel("tcp4_gbits", "TCP, four streams, Gbit/s", "more is better", 1, 2),
    Panel("udp_pps", "64-byte UDP packets without loss, thousand a second", "more is better", 1e-3, 0),
    Panel("cpu_s_per_gb", "CPU seconds of both tunnel ends per GB", "less is better", 1, 2),
    Panel("hot_us", "ping back to back, µs", "less is better", 1, 0),
    Panel("load_p99_us", "ping beside four full TCP streams, 99th percentile, ms", "less is better", 1e-3, 1),
)


def svg(results: Results, link: str = "default") -> str:
    """The chart; panels without figures are left out."""
    rows = [row for row in results.rows if row.link == link and row.tunnel not in _SKIPPED]
    rows.sort(key=lambda row: not row.tunnel.startswith(OURS))
    parts: list[str] = []
    top = float(_MARGIN + 34)
    for panel in PANELS:
        bars = [(row, found) for row in rows if (found := spread(row.series(panel.key, results.rounds)))]
        if bars:
            parts += _panel(panel, bars, top)
            top += _TITLE + _STEP * len(bars) + _PANEL_GAP
    height = round(top + 28)
    return "\n".join([*_head(results, height), *parts, *_foot(results, rows, height), "</svg>"]) + "\n"


def _head(results: Results, height: int) -> list[str]:
    machine = results.machine
    where = f"{machine['cores']} cores, {machine['cpu']}, kernel {machine['kernel']}, {machine['date']}"
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>qvpn and other userspace tunnels on one machine</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(_MARGIN, _MARGIN + 6, "Two tunnel ends, sender and receiver on one machine, MTU 1500", weight=600),
        _text(_MARGIN, _MARGIN + 23, where, colour=_FAINT, size=11),
    ]


def _foot(results: Results, rows: Sequence[Row], height: int) -> list[str]:
    commit = results.machine["commit"]
    others = ", ".join(f"{row.tunnel} {row.version}" for row in rows if not row.tunnel.startswith(OURS))
    note = f"Medians of {results.rounds} interleaved rounds; thin lines: smallest to largest. Commit {commit}."
    return [
        _text(_MARGIN, height - 26, note, colour=_FAINT, size=11),
        _text(_MARGIN, height - 10, others, colour=_FAINT, size=11),
    ]


def _panel(panel: Panel, bars: Sequence[tuple[Row, Spread]], top: float) -> list[str]:
    longest = max(found.high for _, found in bars)
    scale = (_WIDTH - 2 * _MARGIN - _LABEL - _VALUE) / longest
    parts = [
        _text(_MARGIN, top + 14, panel.title, weight=600),
        _text(_WIDTH - _MARGIN, top + 14, panel.better, colour=_FAINT, size=11, anchor="end"),
    ]
    for place, (row, found) in enumerate(bars):
        parts += _bar(panel, row, found, top + _TITLE + place * _STEP, scale)
    return parts


def _bar(panel: Panel, row: Row, found: Spread, top: float, scale: float) -> list[str]:
    colour = _OURS if row.tunnel.startswith(OURS) else _THEIRS
    left, middle = _MARGIN + _LABEL, top + _BAR / 2
    shown = f"{found.median * panel.factor:.{panel.digits}f}"
    end = left + found.high * scale
    return [
        _text(left - 8, middle + 4.5, row.tunnel, anchor="end", weight=600 if row.tunnel == OURS else 400),
        f'<rect x="{left}" y="{top:.1f}" width="{found.median * scale:.1f}" height="{_BAR}" rx="2" fill="{colour}"/>',
        f'<path d="M{left + found.low * scale:.1f} {middle:.1f}H{end:.1f}" stroke="{_INK}" stroke-width="1.2"/>',
        _text(max(end, left + found.median * scale) + 8, middle + 4.5, shown),
        _text(_WIDTH - _MARGIN, middle + 4, row.cipher, colour=_FAINT, size=10, anchor="end"),
    ]


def _text(
    x: float, y: float, text: str, *, colour: str = _INK, size: int = 13, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
