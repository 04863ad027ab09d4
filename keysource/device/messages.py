"""The messages of the device socket as values: what ``framing`` carries, checked.  Sans-IO.

Whatever comes from the other side is read by a ``*_untrusted`` function that raises
:class:`~keysource.errors.BadAnswer` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keysource.base import KEY_BYTES, End, Origin, Owner
from keysource.device.framing import VERSION, Frame
from keysource.errors import BadAnswer

STATES = ("starting", "up", "aborted", "down")
ALARM_KINDS = ("qber", "monitor", "authentication", "device")
MAX_BLOCK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device says of itself in ``hello``; both ends of a link agree in ``link``, ``owner`` and ``origin``."""

    device: str
    """Maker and model, for people."""
    link: str
    """Name of the link: key_IDs are derived from it (``derive_key_id``), the same at both ends."""
    end: End
    owner: Owner = Owner.ALTERNATE
    origin: Origin = Origin.QKD
    hops: int = 0
    """Trusted nodes between the two ends; 0 is one direct link."""

    def header(self) -> dict[str, Any]:
        return {
            "op": "hello",
            "version": VERSION,
            "device": self.device,
            "link": self.link,
            "end": self.end.value,
            "owner": self.owner.value,
            "origin": self.origin.value,
            "hops": self.hops,
            "key_bits": 8 * KEY_BYTES,
        }

    @classmethod
    def from_untrusted(cls, header: Mapping[str, Any]) -> DeviceInfo:
        if header.get("version") != VERSION:
            raise BadAnswer(f"the device speaks version {header.get('version')!r}, this program version {VERSION}")
        if header.get("key_bits") != 8 * KEY_BYTES:
            raise BadAnswer(f"the device has keys of {header.get('key_bits')!r} bits, not {8 * KEY_BYTES}")
        try:
            end, owner = End(text_untrusted(header, "end")), Owner(text_untrusted(header, "owner"))
            origin = Origin(text_untrusted(header, "origin"))
        except ValueError as error:
            raise BadAnswer(f"the device's hello: {error}") from None
        link = text_untrusted(header, "link")
        if not link:
            raise BadAnswer("the device's hello names no link")
        hops = number_untrusted(header, "hops", 255)
        return cls(text_untrusted(header, "device"), link, end, owner, origin, hops)


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Answer to ``status``."""

    state: str
    """One of :data:`STATES`; only ``up`` makes keys."""
    reason: str = ""
    qber: float | None = None
    """Quantum bit error ratio of the last block, 0..1."""
    key_rate: float | None = None
    """Keys per second, measured by the device."""
    alarm: str | None = None
    next_block: int = 0
    """Lower bound of the next block's number."""
    blocks_held: int = 0

    def header(self) -> dict[str, Any]:
        return {
            "op": "status",
            "state": self.state,
            "reason": self.reason,
            "qber": self.qber,
            "key_rate": self.key_rate,
            "alarm": self.alarm,
            "next_block": self.next_block,
            "blocks_held": self.blocks_held,
        }

    @classmethod
    def from_untrusted(cls, header: Mapping[str, Any]) -> DeviceStatus:
        state = text_untrusted(header, "state")
        if state not in STATES:
            raise BadAnswer(f"device state {state!r} is unknown")
        return cls(
            state,
            text_untrusted(header, "reason"),
            _real_or_none(header, "qber"),
            _real_or_none(header, "key_rate"),
            None if header.get("alarm") is None else text_untrusted(header, "alarm"),
            number_untrusted(header, "next_block", MAX_BLOCK + 1),
            number_untrusted(header, "blocks_held", MAX_BLOCK),
        )


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What one block is, where that differs from block to block: relayed keys come now this way, now that."""

    origin: Origin
    hops: int
    """Trusted nodes on the longest of the paths."""
    paths: tuple[tuple[str, ...], ...] = ()
    """Names of the nodes of each path, both ends included."""

    def fields(self) -> dict[str, Any]:
        return {"origin": self.origin.value, "hops": self.hops, "paths": self.paths}

    @classmethod
    def from_untrusted(cls, header: Mapping[str, Any]) -> BlockFacts | None:
        """None where the block says nothing of itself."""
        if "origin" not in header:
            return None
        try:
            origin = Origin(text_untrusted(header, "origin"))
        except ValueError:
            raise BadAnswer("a device block of an unknown origin") from None
        paths = header.get("paths", [])
        if not isinstance(paths, list) or len(paths) > _MOST_PATHS:
            raise BadAnswer("a device block whose paths are no list")
        return cls(origin, number_untrusted(header, "hops", 255), tuple(_path_untrusted(path) for path in paths))


_MOST_PATHS, _MOST_NODES = 16, 258


def _path_untrusted(path: object) -> tuple[str, ...]:
    if not isinstance(path, list) or len(path) > _MOST_NODES:
        raise BadAnswer("a device block with a path that is no list of names")
    return tuple(text_untrusted({"op": "block", "path": node}, "path") for node in path)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """New keys: key ``i`` is ``keys[32 * i : 32 * i + 32]``.  Whoever takes it wipes it."""

    block: int
    keys: bytearray = field(repr=False)
    facts: BlockFacts | None = None
    """None: what ``hello`` says holds for this block too."""

    @property
    def count(self) -> int:
        return len(self.keys) // KEY_BYTES


@dataclass(frozen=True, slots=True)
class VoidEvent:
    """The other end has no blocks below ``before``: erase what is unused of them."""

    before: int


@dataclass(frozen=True, slots=True)
class AlarmEvent:
    """Raised or cleared; per ``kind``."""

    active: bool
    kind: str
    detail: str


Event = BlockEvent | VoidEvent | AlarmEvent


def event_untrusted(frame: Frame) -> Event | None:
    """The event in a frame; None where the frame is an answer."""
    header = frame.header
    match frame.op:
        case "block":
            count = number_untrusted(header, "count", 2**32)
            if not frame.trailer or len(frame.trailer) != count * KEY_BYTES:
                raise BadAnswer(f"device block of {count} keys with {len(frame.trailer)} bytes")
            facts = BlockFacts.from_untrusted(header)
            return BlockEvent(number_untrusted(header, "block", MAX_BLOCK), frame.trailer, facts)
        case "void":
            return VoidEvent(number_untrusted(header, "before", MAX_BLOCK + 1))
        case "alarm":
            kind, active = text_untrusted(header, "kind"), header.get("active")
            if kind not in ALARM_KINDS or not isinstance(active, bool):
                raise BadAnswer(f"device alarm of kind {kind!r}, active {active!r}")
            return AlarmEvent(active, kind, text_untrusted(header, "detail"))
    return None


def number_untrusted(header: Mapping[str, Any], name: str, most: int) -> int:
    """An unsigned integer of a header, 0..most."""
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadAnswer(f"device {header.get('op')}: {name} is not a number from 0 to {most}")
    return value


def text_untrusted(header: Mapping[str, Any], name: str) -> str:
    """A printable text of at most 500 characters."""
    value = header.get(name)
    if not isinstance(value, str) or len(value) > 500 or not (value.isprintable()):
        raise BadAnswer(f"device {header.get('op')}: {name} is not a short printable text")
    return value


def _real_or_none(header: Mapping[str, Any], name: str) -> float | None:
    value = header.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise BadAnswer(f"device {header.get('op')}: {name} is not a number")
    return float(value)
