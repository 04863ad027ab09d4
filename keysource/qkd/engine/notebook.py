"""Eve's notebook, read at her own socket in the fibre: what she holds of the detections of a block.

Whoever may switch Eve may read it; the two sites never do.  It exists so that what she knows of a delivered key can
be counted (``keysource.qkd.audit``) instead of estimated.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np

from keysource.qkd.distill.bits import pack, unpack_untrusted
from keysource.qkd.errors import LinkError
from keysource.qkd.optics.eve import Notes

MOST_NOTES = 300_000
"""Detections whose notes fit one line of the control socket."""


def notes_answer(block: object, notebook: Iterable[tuple[int, Notes | None]]) -> dict[str, Any]:
    """Raises :class:`LinkError` for a block that is not in it, and for more than :data:`MOST_NOTES`."""
    pages = [notes for number, notes in notebook if number == block]
    if not pages:
        raise LinkError("that block is not in Eve's notebook, which has the last few")
    if (notes := pages[-1]) is None:
        return {"block": block, "count": 0}
    count = len(notes.how)
    if count > MOST_NOTES:
        raise LinkError(f"Eve's notes are read for blocks of at most {MOST_NOTES} detections, this one has {count}")
    planes = {"how_high": notes.how >> 1, "how_low": notes.how & 1, "bit": notes.bit}
    packed = {name: base64.b64encode(pack(plane.astype(np.uint8))).decode() for name, plane in planes.items()}
    return {"block": block, "count": count, **packed}


def notes_from(answer: dict[str, Any]) -> Notes | None:
    """What :func:`notes_answer` said; None where Eve kept nothing."""
    if not (count := answer["count"]):
        return None
    high, low, bit = (
        unpack_untrusted(base64.b64decode(answer[name]), count) for name in ("how_high", "how_low", "bit")
    )
    return Notes((2 * high + low).astype(np.uint8), bit)
