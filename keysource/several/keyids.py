"""Several key_IDs in the 64 characters of one.

Each is written as a letter and its content: ``u`` a UUID and ``h`` 32 hexadecimal digits (16 bytes in base85, 20
characters), ``s`` a stream's 32 digits with an index (20 bytes, 25 characters), ``t`` anything else (two digits of
length, text).
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Sequence

MOST = 64
_HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)
_STREAM = re.compile(r"([0-9a-f]{32}):(0|[1-9][0-9]{0,9})", re.ASCII)
_LENGTHS = {"u": 20, "h": 20, "s": 25}


def pack(key_ids: Sequence[str]) -> str:
    """Raises ``ValueError`` where they do not fit."""
    packed = "".join(map(_pack_one, key_ids))
    if len(packed) > MOST:
        raise ValueError(f"the key_IDs of these {len(key_ids)} sources do not fit into {MOST} characters")
    return packed


def unpack(text: str, count: int) -> list[str]:
    """The inverse.  Raises ``ValueError`` for everything that :func:`pack` does not make."""
    found: list[str] = []
    rest = text
    while rest and len(found) < count:
        key_id, rest = _unpack_one(rest)
        found.append(key_id)
    if rest or len(found) != count or pack(found) != text:
        raise ValueError("not the key_IDs of so many sources")
    return found


def _pack_one(key_id: str) -> str:
    if _HEX.fullmatch(key_id):
        return "h" + _b85(bytes.fromhex(key_id))
    if stream := _STREAM.fullmatch(key_id):
        index = int(stream[2])
        if index < 2**32:
            return "s" + _b85(bytes.fromhex(stream[1]) + index.to_bytes(4, "big"))
    try:
        if str(uuid.UUID(key_id)) == key_id:
            return "u" + _b85(uuid.UUID(key_id).bytes)
    except ValueError:
        pass
    return f"t{len(key_id):02d}{key_id}"


def _unpack_one(text: str) -> tuple[str, str]:
    kind, rest = text[0], text[1:]
    if kind == "t":
        if not re.fullmatch(r"[0-9]{2}", rest[:2], re.ASCII):
            raise ValueError("no length")
        end = 2 + int(rest[:2])
        return rest[2:end], rest[end:]
    length = _LENGTHS.get(kind, 0)
    raw = base64.b85decode(rest[:length]) if length else b""
    if len(raw) != length // 5 * 4 or not raw:
        raise ValueError("no such kind of key_ID")
    rest = rest[length:]
    match kind:
        case "u":
            return str(uuid.UUID(bytes=raw)), rest
        case "h":
            return raw.hex(), rest
    return f"{raw[:16].hex()}:{int.from_bytes(raw[16:], 'big')}", rest


def _b85(raw: bytes) -> str:
    return base64.b85encode(raw).decode("ascii")
