"""Pictures of ``qvpn-qkd attack``: its ``--json`` object, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keysource.qkd.pictures.base import BLUE, GREEN, GREY, ORANGE, RED, blank
from keysource.qkd.presets import PRESETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PASSED, _CAUGHT, _LEAKED = "#d5efdf", "#fdebd0", "#f5b7b1"


def course(facts: Mapping[str, Any]) -> Figure:
    """QBER and gains block by block, Eve's blocks shaded."""
    (run,) = facts["runs"].values()
    blocks = [block for act in run["acts"].values() for block in act]
    plan = PRESETS[facts["preset"]].plan()
    figure, axes = blank(8.0, 4.8)
    _shade(axes, [len(act) for act in run["acts"].values()])
    known = [(i, 100 * block["qber"]) for i, block in enumerate(blocks) if block.get("qber") is not None]
    axes.plot([i for i, _q in known], [q for _i, q in known], "o-", color=BLUE, label="QBER")
    limit = 100 * plan.check_errors / plan.n_x
    axes.axhline(limit, color=BLUE, linestyle=":", label=f"QBER limit, {limit:.2f} %")
    axes.set_ylabel("QBER of the check basis in %", color=BLUE)
    axes.set_ylim(0, max([limit, *(q for _i, q in known)]) * 1.25)
    _gains(axes, blocks, PRESETS[facts["preset"]])
    axes.set_xticks(range(len(blocks)), [f"{b['block']}\n{_short(b)}" for b in blocks], fontsize=8)
    axes.set_xlabel("block and its verdict")
    axes.set_title(f"{facts['attack']} on {facts['preset']}", fontsize=11)
    return figure


def _gains(axes: Axes, blocks: Sequence[Mapping[str, Any]], preset: Any) -> None:
    """Each gain over what the closed form expects: 1 without Eve."""
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    kinds = (("signal", GREEN), ("decoy", ORANGE))[: len(preset.optics.intensities)]
    for i, (name, color) in enumerate(kinds):
        expected = preset.optics.gain(preset.optics.intensities[i])
        points = [(k, block["gains"][i] / expected) for k, block in enumerate(blocks) if block.get("gains")]
        size = 8 - 4 * i  # where both are 1, the larger looks out behind the smaller
        other.plot(
            [k for k, _g in points], [g for _k, g in points], "s--", color=color, ms=size, label=f"gain, {name}"
        )
    other.set_ylim(0, 2)
    other.set_ylabel("gain over its expected value")
    lines = [*axes.get_lines(), *other.get_lines()]
    shown = [line for line in lines if not str(line.get_label()).startswith("_")]
    axes.legend(handles=shown, loc="upper center", ncols=4, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 1.0))


def _shade(axes: Axes, lengths: Sequence[int]) -> None:
    first = lengths[0] - 0.5
    axes.axvspan(first, first + lengths[1], color=RED, alpha=0.08, lw=0)
    axes.text(first + lengths[1] / 2, 0.86, "Eve", color=RED, ha="center", transform=axes.get_xaxis_transform())


def _short(block: Mapping[str, Any]) -> str:
    verdict = {block["at_alice"], block["at_bob"]} - {"passed"}
    return str(sorted(verdict)[0]) if verdict else "passed"


def truth_table(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """``{mode: {monitor: run}}``: what fired, and where nothing did."""
    monitors = list(next(iter(runs.values())))
    cells, colors = [], []
    for of_mode in runs.values():
        cells.append([_cell(of_mode[guard]) for guard in monitors])
        colors.append([_LEAKED if of_mode[guard]["undetected"] else _PASSED for guard in monitors])
    rows = [f"{'continuous' if mode == 'cw' else mode} light" for mode in runs]
    columns = [f"monitor:\n{guard}" for guard in monitors]
    return _table(rows, columns, cells, colors, "Detector blinding against Bob's monitors", 1.9)


def _cell(run: Mapping[str, Any]) -> str:
    if not run["undetected"]:
        return "fires\nno key"
    eve = [block["eve"] for block in run["acts"]["Eve"] if "eve" in block]
    bits, hers = (sum(each.get(name, 0) for each in eve) for name in ("final_bits", "determined"))
    return f"nothing fires\n{run['keys_delivered_with_eve']} keys, Eve has\n{hers} of {bits} bits"


def deeds(found: Sequence[Mapping[str, Any]]) -> Figure:
    """The man in the middle: frame by frame."""
    rows = [f"{deed['frame']}: {deed['deed']}" for deed in found]
    cells = [[_told(deed), str(deed["keys_delivered"])] for deed in found]
    colors = [[_CAUGHT, _PASSED if deed["keys_delivered"] == 0 else _LEAKED] for deed in found]
    return _table(rows, ["Alice / Bob, alarm", "keys\ndelivered"], cells, colors, "A frame is touched", 1.4)


def _told(deed: Mapping[str, Any]) -> str:
    alarms = ", ".join(deed["alarms"]) or "none"
    return f"{deed['at_alice']} / {deed['at_bob']}; alarm: {alarms}"


def _table(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    colors: Sequence[Sequence[str]],
    title: str,
    tall: float,
) -> Figure:
    from matplotlib.transforms import Bbox

    figure, axes = blank(8.4, 1.1 + 0.36 * tall * len(rows))
    axes.axis("off")
    table = axes.table(
        cellText=[list(row) for row in cells],
        cellColours=[list(row) for row in colors],
        rowLabels=list(rows),
        colLabels=list(columns),
        colColours=["#ecf0f1"] * len(columns),
        cellLoc="center",
        bbox=Bbox.from_bounds(0.0, 0.0, 1.0, 1.0),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for cell in table.get_celld().values():
        cell.set_edgecolor(GREY)
        cell.set_linewidth(0.5)
    axes.set_title(title, fontsize=11)
    return figure
