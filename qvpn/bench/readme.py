"""The README's table: what ``results.json`` says, short, between two marks.

``python -m qvpn.bench.readme deploy/bench/results.json README.md`` (``make bench-readme``) puts it there.  Nothing in
it is written by hand, so it cannot differ from the run that it names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qvpn.bench.cases import OVER_QUIC, OVER_TCP
from qvpn.bench.link import LINKS
from qvpn.bench.results import Results, Row, from_json
from qvpn.bench.stats import ratio, spread
from qvpn.bench.table import COLUMNS, OURS, Column, carriers, grid, heading

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_DEFAULT = "default"


def section(results: Results, folder: str) -> str:
    """Chart, figures and ratios in Markdown; ``folder``: where the chart and the full table are, for links."""
    columns = [column for column in COLUMNS if any(column.key in row.figures for row in results.rows)]
    parts = [
        f"![Bars: qvpn and other tunnels, the figures of the table]({folder}/chart.svg)",
        _figures(results, columns),
        f"qvpn's figure divided by the other's, median of the rounds' ratios (times and CPU: less is better):\n\n"
        f"{_ratios(results, columns)}",
        *([f"Where only QUIC or only TCP passes:\n\n{found}"] if (found := carriers(results)) else []),
        f"{heading(results)} All figures with their spreads: [results.md]({folder}/results.md).",
    ]
    return "\n\n".join(parts)


def put(text: str, part: str) -> str:
    """``text`` with ``part`` between the marks.  Raises ValueError where they are not there once each, in order."""
    before, mark, rest = text.partition(BEGIN)
    _, other, after = rest.partition(END)
    if not mark or not other or BEGIN in rest or END in after:
        raise ValueError(f"the text must have {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def _figures(results: Results, columns: Sequence[Column]) -> str:
    lines = [["tunnel", "version", "cipher", *(column.title for column in columns)]]
    for row in _rows(results, _DEFAULT):
        shown = [_median(results, row, column) for column in columns]
        lines.append([row.tunnel, row.version, row.cipher, *shown])
    return grid(lines)


def _ratios(results: Results, columns: Sequence[Column]) -> str:
    lines = [["qvpn divided by", *(column.title.split(",")[0] for column in columns)]]
    for link in results.links():
        ours = results.row(OURS, link)
        for other in _rows(results, link):
            if ours is None or other.tunnel.startswith(OURS) or other.tunnel == "no tunnel":
                continue
            name = other.tunnel if link == _DEFAULT else f"{other.tunnel}, {LINKS[link].about}"
            lines.append([name, *(_ratio(results, ours, other, column) for column in columns)])
    return grid(lines)


def _rows(results: Results, link: str) -> list[Row]:
    """Without those that have a table of their own."""
    return [row for row in results.rows if row.link == link and row.tunnel not in (OVER_QUIC, OVER_TCP)]


def _median(results: Results, row: Row, column: Column) -> str:
    found = spread(row.series(column.key, results.rounds))
    return "–" if found is None else f"{found.median * column.factor:.{column.digits}f}"


def _ratio(results: Results, ours: Row, other: Row, column: Column) -> str:
    found = ratio(ours.series(column.key, results.rounds), other.series(column.key, results.rounds))
    return "–" if found is None else f"{found.median:.2f}"


def main(arguments: Sequence[str]) -> int:
    """``results.json README.md``; 0 if the README has the table now."""
    if len(arguments) != 2:
        print("usage: python -m qvpn.bench.readme results.json README.md", file=sys.stderr)
        return 2
    source, target = Path(arguments[0]), Path(arguments[1])
    try:
        part = section(from_json(source.read_text()), source.parent.as_posix())
        target.write_text(put(target.read_text(), part))
    except (OSError, ValueError) as error:
        print(f"qvpn bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
