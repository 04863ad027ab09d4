"""What nodes say to each other.  One hop follows the shape of ETSI GS QKD 020; the rest is ours.

==================================  ==============================================================================
``POST /kmapi/v1/ext_keys``         a share goes one hop on: :class:`Share`.  ``keys[0].key_ID`` names the transfer,
                                    ``keys[0].key`` is the masked share; the hop's header and tag are in
                                    ``extension_mandatory`` under ``qvpn_relay``.  Answer 202.
``POST /kmapi/v1/ack``              what became of it: :class:`Ack`, in an array.  It goes to the address on the map;
                                    ``ack_callback_url`` must name the same one.
``POST /kmapi/v1/void``             forget a transfer: :class:`Void`
``GET /kmapi/versions``             ``{"versions": ["v1"]}``
``POST /kmapi/v1/qvpn``             the two ends of a connection: :class:`Open`, :class:`Ready`, :class:`Proof`,
                                    :class:`Commit`, :class:`Verdict`; and stocks: :class:`Ask`, :class:`Stock`
==================================  ==============================================================================

(020 was read in the version that its published reference implementation follows, v0.6.2; SAE IDs there are the ends'
node IDs here, since what is relayed is a stock that no SAE has asked for yet.)

Whatever comes from another node is read by a ``*_untrusted`` function that raises :class:`BadMessage` and nothing
else.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from keysource.base import KEY_BYTES
from keysource.network import onetime, shares
from keysource.network.errors import NetworkError
from keysource.network.topology import MOST_HOPS, MOST_KEYS, MOST_PATHS
from keysource.settings import sentence

EXT_KEYS, ACK, VOID, OURS, VERSIONS = (
    "/kmapi/v1/ext_keys",
    "/kmapi/v1/ack",
    "/kmapi/v1/void",
    "/kmapi/v1/qvpn",
    "/kmapi/versions",
)
MAX_BODY = 256 * 1024
RELAY = "qvpn_relay"
_Model = TypeVar("_Model", bound=BaseModel)


class BadMessage(NetworkError):
    """What another node sent is none of these messages; one sentence."""


def _bytes(value: object) -> object:
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not base64") from None
    return value


def _path(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _printable(value: str) -> str:
    if not value.isprintable():  # it goes into logs and onto terminals
        raise ValueError("not printable")
    return value


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


Blob = Annotated[bytes, BeforeValidator(_bytes), PlainSerializer(_base64)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
Text = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Ppath = Annotated[tuple[Name, ...], BeforeValidator(_path), Field(min_length=2, max_length=MOST_HOPS + 2)]
Ppaths = Annotated[tuple[Ppath, ...], BeforeValidator(_path), Field(min_length=1, max_length=MOST_PATHS)]
Uuids = Annotated[tuple[Uuid, ...], BeforeValidator(_path)]
_MOST_UNITS = onetime.units_for(shares.wrapped_bytes(MOST_KEYS))


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def __repr__(self) -> str:  # a share's bytes have no business in a log
        return type(self).__name__


class Header(_Message):
    """All of a hop but the masked bytes; authenticated with them."""

    transfer: Uuid
    connection: Name
    block: Number
    count: Annotated[int, Field(ge=1, le=MOST_KEYS)]
    path: Ppath
    index: Annotated[int, Field(ge=0, lt=MOST_PATHS)]
    """Which of the block's paths this is."""
    hop: Annotated[int, Field(ge=0, le=MOST_HOPS)]
    """Place of the sender on the path."""
    attempt: Annotated[int, Field(ge=1, le=1000)]
    kem: Annotated[Blob, Field(min_length=shares.CT_BYTES, max_length=shares.CT_BYTES)]
    link: Name
    pad: Annotated[Uuids, Field(min_length=1, max_length=_MOST_UNITS)]
    """Units of the link that mask the share, by key_ID."""
    mac: Uuid
    """The unit that the tag is made with."""

    def encoded(self) -> bytes:
        """The one encoding that the tag covers."""
        return shares.canonical({"label": "qvpn relay hop v1", **self.model_dump()})

    @property
    def units(self) -> tuple[str, ...]:
        return (*self.pad, self.mac)


class Share(_Message):
    """A share on one hop."""

    header: Header
    masked: Blob
    tag: Annotated[Blob, Field(min_length=onetime.TAG_BYTES, max_length=onetime.TAG_BYTES)]


class Ack(_Message):
    """The next node's answer to a share.  The statuses are those of ETSI GS QKD 020."""

    transfer: Uuid
    index: Annotated[int, Field(ge=0, lt=MOST_PATHS)]
    attempt: Annotated[int, Field(ge=1, le=1000)]
    status: Literal["relayed", "failed", "key not present"]
    """``relayed``: the pad is erased and the share is there.  ``key not present``: units of the pad are not there."""
    message: Text = ""
    at: Annotated[tuple[Name, ...], BeforeValidator(_path), Field(max_length=2)] = ()
    """``failed``: between which nodes."""
    first_block: Number = 0
    next_block: Number = 0


class Void(_Message):
    """The initiator has given a transfer up."""

    transfer: Uuid


class Open(_Message):
    """Initiator to target: a block is on its way."""

    op: Literal["open"] = "open"
    transfer: Uuid
    connection: Name
    block: Number
    count: Annotated[int, Field(ge=1, le=MOST_KEYS)]
    paths: Ppaths
    origin: Name


class Ready(_Message):
    """Target to initiator: send; the shares are wrapped for this public key."""

    op: Literal["ready"] = "ready"
    transfer: Uuid
    ek: Annotated[Blob, Field(min_length=shares.EK_BYTES, max_length=shares.EK_BYTES)]


class Proof(_Message):
    """Target to initiator: all shares are here, and this is what they make."""

    op: Literal["proof"] = "proof"
    transfer: Uuid
    tag: Annotated[Blob, Field(min_length=32, max_length=32)]


class Commit(_Message):
    """Initiator to target: the same here, and on the disk; have it on yours."""

    op: Literal["commit"] = "commit"
    transfer: Uuid
    connection: Name
    tag: Annotated[Blob, Field(min_length=32, max_length=32)]


class Verdict(_Message):
    """Target to initiator.  Once said it stays so: whatever is not ``committed`` never will be."""

    op: Literal["verdict"] = "verdict"
    transfer: Uuid
    committed: bool
    message: Text = ""
    index: Annotated[int, Field(ge=-1, lt=MOST_PATHS)] = -1
    """The path that is to blame, or -1."""
    altered: bool = False
    """It brought something else than was sent; else it brought nothing."""


class Ask(_Message):
    """How much can you send, and where?"""

    op: Literal["ask"] = "ask"


class LinkStock(_Message):
    link: Name
    units: Number
    """Own units, free."""
    up: bool
    """The device is there."""
    alarm: bool
    seen_block: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    """How far the one who says this has seen the other end use its units."""
    seen_position: Annotated[int, Field(ge=-1, lt=2**63)] = -1


class Stock(_Message):
    """Answer to :class:`Ask`."""

    op: Literal["stock"] = "stock"
    links: Annotated[tuple[LinkStock, ...], BeforeValidator(_path), Field(max_length=1024)]


Message = Share | Ack | Void | Open | Ready | Proof | Commit | Verdict | Ask | Stock
_OURS: dict[str, type[Open | Ready | Proof | Commit | Verdict | Ask | Stock]] = {
    "open": Open,
    "ready": Ready,
    "proof": Proof,
    "commit": Commit,
    "verdict": Verdict,
    "ask": Ask,
    "stock": Stock,
}


class _ExtKey(_Message):
    key_ID: Uuid
    key: Blob


class _ExtKeys(_Message):
    keys: Annotated[list[_ExtKey], Field(min_length=1, max_length=1)]
    initiator_sae_id: Name
    target_sae_ids: Annotated[list[Name], Field(min_length=1, max_length=1)]
    ack_callback_url: Annotated[str, Field(max_length=500)]
    extension_mandatory: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
    extension_optional: list[dict[str, Any]] = Field(default_factory=list, max_length=16)


class _ExtAck(_Message):
    key_ids: Annotated[list[Uuid], Field(min_length=1, max_length=1)]
    ack_status: str
    initiator_sae_id: Name
    target_sae_id: Name
    message: Text = ""
    extension: dict[str, Any]


class _ExtVoid(_Message):
    key_ids: Annotated[list[Uuid], Field(min_length=1, max_length=1)]
    initiator_sae_id: Name
    target_sae_ids: list[Name] = Field(default_factory=list, max_length=16)


def encode(message: Message, sender: str, url: str) -> tuple[str, bytes]:
    """(path, body) of a request; ``url`` is the sender's own."""
    match message:
        case Share():
            header = message.header
            mine = header.model_dump(exclude={"transfer"}) | {"tag": _base64(message.tag)}
            return EXT_KEYS, _json(
                {
                    "keys": [{"key_ID": header.transfer, "key": _base64(message.masked)}],
                    "initiator_sae_id": header.path[0],
                    "target_sae_ids": [header.path[-1]],
                    "ack_callback_url": url + ACK,
                    "extension_mandatory": [{RELAY: mine}],
                }
            )
        case Ack():
            extension = message.model_dump(exclude={"transfer", "status", "message"})
            return ACK, _json(
                [
                    {
                        "key_ids": [message.transfer],
                        "ack_status": message.status,
                        "initiator_sae_id": sender,
                        "target_sae_id": sender,
                        "message": message.message,
                        "extension": {RELAY: extension},
                    }
                ]
            )
        case Void():
            return VOID, _json({"key_ids": [message.transfer], "initiator_sae_id": sender, "target_sae_ids": []})
    return OURS, _json(message.model_dump())


def decode_untrusted(path: str, body: bytes, callback: str) -> Message:
    """``callback`` is the only ``ack_callback_url`` that the sender may name.  Raises :class:`BadMessage`."""
    if len(body) > MAX_BODY:
        raise BadMessage("the message is too long")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        raise BadMessage("the message is not JSON") from None
    try:
        return _decoded(path, parsed, callback)
    except ValidationError as error:
        raise BadMessage(sentence(error)[:300]) from None


def _decoded(path: str, parsed: Any, callback: str) -> Message:
    match path:
        case _ if path == EXT_KEYS:
            return _share(_ExtKeys.model_validate(parsed), callback)
        case _ if path == ACK:
            if not isinstance(parsed, list) or len(parsed) != 1:
                raise BadMessage("an acknowledgement is an array of one")
            ack = _ExtAck.model_validate(parsed[0])
            said = {"transfer": ack.key_ids[0], "status": ack.ack_status, "message": ack.message}
            return Ack.model_validate(_extension([ack.extension]) | said)
        case _ if path == VOID:
            return Void(transfer=_ExtVoid.model_validate(parsed).key_ids[0])
        case _ if path == OURS:
            kind = parsed.get("op") if isinstance(parsed, dict) else None
            if not isinstance(kind, str) or kind not in _OURS:
                raise BadMessage("no such message")
            return _OURS[kind].model_validate(parsed)
    raise BadMessage("no such method")


def _share(asked: _ExtKeys, callback: str) -> Share:
    if asked.ack_callback_url != callback:
        raise BadMessage("ack_callback_url is not where the map says that the sender listens")
    fields = dict(_extension(asked.extension_mandatory))
    tag = fields.pop("tag", None)
    header = Header.model_validate(fields | {"transfer": asked.keys[0].key_ID})
    if (asked.initiator_sae_id, asked.target_sae_ids[0]) != (header.path[0], header.path[-1]):
        raise BadMessage("the ends are not those of the path")
    if len(asked.keys[0].key) != shares.wrapped_bytes(header.count):
        raise BadMessage("a share of another length than its number of keys makes")
    if len(header.pad) * KEY_BYTES < len(asked.keys[0].key) or len(set(header.units)) != len(header.units):
        raise BadMessage("the pad is shorter than the share, or has a unit twice")
    return Share.model_validate({"header": header, "masked": asked.keys[0].key, "tag": tag})


def _extension(extensions: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for extension in extensions for name in extension]
    if names != [RELAY] or not isinstance(extensions[0][RELAY], dict):
        raise BadMessage("not all extension_mandatory parameters are supported")
    found: dict[str, Any] = extensions[0][RELAY]
    return found


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
