"""Cisco's SKIP (Secure Key Integration Protocol, draft-cisco-skip-02, an individual Internet-Draft), both sides.

Four requests, all GET, all answered with one JSON object; bytes are hexadecimal:

===========================================  ===================================================================
``/capabilities``                            ``entropy, key, algorithm, localSystemID, remoteSystemID[]``
``/key?remoteSystemID=ID[&size=BITS]``       ``keyId, key``: a new key, by default of 256 bits
``/key/KEYID?remoteSystemID=ID``             ``keyId, key``: the key that the other end was given; gone afterwards
``/entropy[?minentropy=BITS]``               ``randomStr, minentropy``
===========================================  ===================================================================

An entry of ``remoteSystemID[]`` may be a glob (``*``, ``?``, ``[...]``).  In the wild the query is also spelled
``remoteSystemId``; a server here takes any case.  The draft has no field for where a key was made, so a server of
ours adds two HTTP headers, which any other client ignores: ``Qvpn-Origin`` and ``Qvpn-Hops``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from keysource.base import wipe
from keysource.errors import BadAnswer

DEFAULT_KEY_BITS = 256
ORIGIN_HEADER, HOPS_HEADER = "Qvpn-Origin", "Qvpn-Hops"
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){1,32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a key provider says of itself."""

    local_system: str
    remote_systems: tuple[str, ...]
    """Names or globs."""
    key: bool = True
    entropy: bool = False
    algorithm: str = "QKD"

    def knows(self, remote_system: str) -> bool:
        return any(fnmatchcase(remote_system, pattern) for pattern in self.remote_systems)

    def to_json(self) -> bytes:
        fields = {
            "entropy": self.entropy,
            "key": self.key,
            "algorithm": self.algorithm,
            "localSystemID": self.local_system,
            "remoteSystemID": list(self.remote_systems),
        }
        return json.dumps(fields).encode()


@dataclass(frozen=True, slots=True)
class SkipKey:
    """One key; whoever takes it wipes it."""

    key_id: str
    """Lower-case hexadecimal, at most 64 digits."""
    material: bytearray = field(repr=False)

    def to_json(self) -> bytearray:
        """To be wiped by the caller; the hexadecimal text on the way there is not in our hands."""
        return bytearray(json.dumps({"keyId": self.key_id, "key": self.material.hex()}).encode())


def capabilities_untrusted(body: bytes) -> Capabilities:
    """Raises :class:`BadAnswer`."""
    fields = _object(body)
    local, remote = _spelled(fields, "localSystemID"), _spelled(fields, "remoteSystemID")
    patterns = [remote] if isinstance(remote, str) else remote
    if not isinstance(local, str) or not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise BadAnswer("the key provider's capabilities name no localSystemID and remoteSystemID[]")
    if len(patterns) > 10_000 or any(len(pattern) > 500 for pattern in patterns):
        raise BadAnswer("the key provider's capabilities name too much")
    key, algorithm = fields.get("key"), fields.get("algorithm")
    return Capabilities(
        local,
        tuple(patterns),
        key if isinstance(key, bool) else True,
        fields.get("entropy") is True,
        algorithm[:100] if isinstance(algorithm, str) else "",
    )


def key_untrusted(body: bytes, *, key_bytes: int) -> SkipKey:
    """A key of exactly ``key_bytes`` bytes.  Raises :class:`BadAnswer`."""
    fields = _object(body)
    key_id, key = _spelled(fields, "keyId"), fields.get("key")
    if not isinstance(key, str) or not isinstance(key_id, str):
        raise BadAnswer("the key provider's answer has no keyId and key")
    key_id = key_id_untrusted(key_id)
    try:
        material = bytearray.fromhex(key) if re.fullmatch(r"[0-9a-fA-F]*", key, re.ASCII) else None
    except ValueError:
        material = None
    if material is None:
        raise BadAnswer("the key provider's key is not hexadecimal")
    if len(material) != key_bytes:
        wipe(material)
        raise BadAnswer(f"the key provider gave a key of {8 * len(material)} bits, {8 * key_bytes} were asked for")
    return SkipKey(key_id, material)


def key_id_untrusted(key_id: str) -> str:
    """Lower case.  Raises :class:`BadAnswer` where it is not 1 to 32 bytes in hexadecimal."""
    if not _HEX.fullmatch(key_id):
        raise BadAnswer("a keyId that is not 2 to 64 hexadecimal digits, an even number of them")
    return key_id.lower()


def error_text_untrusted(body: bytes) -> str:
    """What an error body says, for people: at most 200 printable characters, often nothing."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    text = (
        next((fields[name] for name in ("message", "error", "detail") if name in fields), "")
        if (isinstance(fields, dict))
        else ""
    )
    return "".join(c if c.isprintable() else " " for c in text[:200]).strip() if isinstance(text, str) else ""


def _spelled(fields: dict[str, Any], name: str) -> object:
    """A field in whatever case."""
    return next((value for key, value in fields.items() if key.lower() == name.lower()), None)


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer("the key provider's answer is not JSON") from None
    if not isinstance(fields, dict):
        raise BadAnswer("the key provider's answer is not a JSON object")
    return fields
