"""What the demo measures on bytes and on processes.  Nothing here knows what should come out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

HALF = 16
_SIGMAS = 8.0
Pair = tuple[bytes, bytes]


def halves_among(texts: Iterable[bytes], keys: Iterable[bytes]) -> int:
    """How many halves of keys (of 32 bytes) stand anywhere in the texts."""
    windows = {text[i : i + HALF] for text in texts for i in range(len(text) - HALF + 1)}
    return sum(key[i : i + HALF] in windows for key in keys for i in (0, HALF))


def agreement(pairs: Sequence[Pair]) -> float:
    """The part of all bits in which the two of a pair are equal; a half where one says nothing about the other."""
    bits = sum(8 * len(left) for left, _right in pairs)
    differ = sum((int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).bit_count() for left, right in pairs)
    return 1.0 - differ / bits


def says_something(pairs: Sequence[Pair]) -> bool:
    """Is the agreement further from a half than chance explains, once in 10**14?"""
    bits = sum(8 * len(left) for left, _right in pairs)
    return abs(agreement(pairs) - 0.5) > _SIGMAS * 0.5 / math.sqrt(bits)


def processes_naming(text: str) -> dict[int, str]:
    """Other processes than this one, of any parent, with ``text`` in command line or environment: id and command."""
    wanted, found = text.encode(), dict[int, str]()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted in command or wanted in environment:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found
