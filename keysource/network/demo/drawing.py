"""The map as text: links that carry a share in colour, links that are cut or alarmed marked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from rich.text import Text

_COLOURS = ("green", "cyan", "magenta", "yellow")
_CUT, _ALARM, _IDLE = "bold red", "bold red", "bright_black"


@dataclass(slots=True)
class Picture:
    """Which paths the last block took, and which links are not in use."""

    paths: list[list[str]]
    down: set[str] = field(default_factory=set)
    alarms: set[str] = field(default_factory=set)

    def style(self, link: str) -> str:
        if link in self.down:
            return _CUT
        if link in self.alarms:
            return _ALARM
        share = self.share(link)
        return _IDLE if share is None else f"bold {_COLOURS[share % len(_COLOURS)]}"

    def share(self, link: str) -> int | None:
        """Which of the paths uses the link."""
        left, _, right = link.partition("-")
        for number, path in enumerate(self.paths):
            pairs = set(itertools.pairwise(path))
            if (left, right) in pairs or (right, left) in pairs:
                return number
        return None

    def mark(self, link: str, plain: str) -> str:
        """How a link is drawn: ``x`` cut, ``!`` alarm, the share's number, or just a line."""
        if link in self.down:
            return "x"
        if link in self.alarms:
            return "!"
        share = self.share(link)
        return plain if share is None else str(share + 1)


def drawn(picture: Picture) -> Text:
    """The demo's five nodes.  Numbers are shares; x is a cut link, ! one with an alarm."""

    def line(link: str, text: str, plain: str) -> tuple[str, str]:
        return text.replace("?", picture.mark(link, plain)), picture.style(link)

    node = "bold"
    rows: list[list[tuple[str, str]]] = [
        [("                 ", ""), ("north", node)],
        [
            ("           ", ""),
            line("west-north", ".--'?'", "-"),
            ("  ", ""),
            line("north-middle", "|", "|"),
            ("  ", ""),
            line("north-east", "'?'--.", "-"),
        ],
        [
            ("          ", ""),
            line("west-north", "/", "/"),
            ("        ", ""),
            line("north-middle", "?", "|"),
            ("        ", ""),
            line("north-east", "\\", "\\"),
        ],
        [
            ("      ", ""),
            ("west", node),
            (" ", ""),
            line("west-middle", "--?--", "-"),
            (" ", ""),
            ("middle", node),
            (" ", ""),
            line("middle-east", "--?--", "-"),
            (" ", ""),
            ("east", node),
        ],
        [
            ("          ", ""),
            line("west-south", "\\", "\\"),
            ("        ", ""),
            line("middle-south", "?", "|"),
            ("        ", ""),
            line("south-east", "/", "/"),
        ],
        [
            ("           ", ""),
            line("west-south", "'--.?.", "-"),
            ("  ", ""),
            line("middle-south", "|", "|"),
            ("  ", ""),
            line("south-east", ".?.--'", "-"),
        ],
        [("                 ", ""), ("south", node)],
    ]
    text = Text()
    for row in rows:
        for part, style in row:
            text.append(part, style=style)
        text.append("\n")
    return text
