"""What all pictures have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from keysource.qkd.errors import LinkSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREEN, RED, GREY, VIOLET = "#1f6fb4", "#e07b00", "#2e8b57", "#c0392b", "#7f8c8d", "#7d3c98"
_NEEDED = "plots need matplotlib: pip install 'qvpn[plots]'"


def wanted(path: Path) -> None:
    """Before a long run.  Raises :class:`LinkSettings` where the plot could not be written at its end."""
    if path.suffix not in KINDS:
        raise LinkSettings(f"--plot {path}: a file that ends in {', '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise LinkSettings(f"--plot {path}: there is no such folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LinkSettings(_NEEDED) from None


def blank(width: float = 8.0, height: float = 4.6) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of axes.  Raises :class:`LinkSettings` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LinkSettings(_NEEDED) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """The same figure gives the same bytes.  Raises :class:`LinkSettings` where it cannot be written."""
    import matplotlib

    stamp = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
    try:
        with matplotlib.rc_context({"svg.hashsalt": "qvpn"}):
            figure.savefig(path, dpi=110, metadata=stamp)
    except (OSError, ValueError) as error:
        raise LinkSettings(f"{path}: {error}") from None
