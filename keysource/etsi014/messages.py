"""The data formats of ETSI GS QKD 014 V1.1.1 clause 6, for both sides.

A **server** validates requests with the models as they stand: a value of a wrong type is an error (clause 6 gives
every field one JSON type), an unknown field is ignored, ``null`` is not "absent".  A **client** reads answers with
the ``*_untrusted`` functions, which forgive what is seen in the field: ``null`` for an absent optional field, unknown
fields, ``Keys`` for ``keys`` (table 11 of the standard heads the array so), upper-case UUIDs, ``detail`` for
``message``, error bodies that are not JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keysource.base import wipe
from keysource.errors import BadAnswer
from keysource.settings import sentence

SIZE_NOT_MULTIPLE = "size shall be a multiple of 8"
MANDATORY_UNSUPPORTED = "not all extension_mandatory parameters are supported"
MANDATORY_UNMET = "not all extension_mandatory request options could be met"
OPTIONAL_UNHANDLED = "not all extension_optional request options handled"
KEYS_NOT_FOUND = "one or more keys specified are not found on KME"
"""The five messages that the standard gives word for word; each goes with status 400."""

Extension = dict[str, Any]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class Status(_Model):
    """Answer of ``status`` (clause 6.1).  Sizes are in bits, counts are keys."""

    source_KME_ID: str
    target_KME_ID: str
    master_SAE_ID: str
    slave_SAE_ID: str
    key_size: int
    stored_key_count: int
    max_key_count: int
    max_key_per_request: int
    max_key_size: int
    min_key_size: int
    max_SAE_ID_count: int
    status_extension: Extension = Field(default_factory=dict)


class KeyRequest(_Model):
    """Body of POST ``enc_keys`` (clause 6.2); every field may be absent.  ``size`` is in bits."""

    number: int = 1
    size: int | None = Field(default=None)
    additional_slave_SAE_IDs: list[str] = Field(default_factory=list)
    extension_mandatory: list[Extension] = Field(default_factory=list)
    extension_optional: list[Extension] = Field(default_factory=list)


class KeyID(_Model):
    """One entry of :class:`KeyIDs`."""

    key_ID: str
    key_ID_extension: Extension = Field(default_factory=dict)


class KeyIDs(_Model):
    """Body of POST ``dec_keys`` (clause 6.4)."""

    key_IDs: list[KeyID]
    key_IDs_extension: Extension = Field(default_factory=dict)


class KeyEntry(_Model):
    """One key of a :class:`KeyContainer`; ``key`` is base64 (RFC 4648)."""

    key_ID: str
    key: str = Field(repr=False)
    key_ID_extension: Extension = Field(default_factory=dict)
    key_extension: Extension = Field(default_factory=dict)


class KeyContainer(_Model):
    """Answer of ``enc_keys`` and ``dec_keys`` (clause 6.3)."""

    keys: list[KeyEntry] = Field(repr=False)
    key_container_extension: Extension = Field(default_factory=dict)


class Error(_Model):
    """Body of a 400 or 503 (clause 6.5).  A 401 has no body."""

    message: str
    details: list[Extension] = Field(default_factory=list)


def to_json(model: BaseModel) -> bytes:
    """UTF-8 JSON without the optional fields that were not set."""
    return model.model_dump_json(exclude_unset=True).encode()


def request_untrusted(body: bytes) -> KeyRequest:
    """A Key request as a server must read it: an empty body and ``{}`` are legal, ``null`` fields are not.

    Raises:
        ValueError: one sentence that names the field.
    """
    fields = _object(body or b"{}")
    if "size" in fields and fields["size"] is None:
        raise ValueError("size: a number is expected, not null")
    return _checked(KeyRequest, fields)


def key_ids_untrusted(body: bytes) -> KeyIDs:
    """Key IDs as a server must read them.  Raises ``ValueError``, one sentence."""
    return _checked(KeyIDs, _object(body))


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("the body is not a JSON object")
    return fields


_M = TypeVar("_M", bound=BaseModel)


def _checked(model: type[_M], fields: dict[str, Any]) -> _M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise ValueError(sentence(error)) from None


# What a client reads


@dataclass(frozen=True, slots=True)
class DeliveredKey:
    """One key out of a key container."""

    key_id: str
    """Normalised: see :func:`normalise_key_id`."""
    material: bytearray = field(repr=False)
    extension: Extension = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StatusAnswer:
    """The part of a Status that a client acts upon; None where the KME said nothing that can be used."""

    stored_key_count: int | None = None
    key_size: int | None = None
    max_key_per_request: int | None = None
    extension: Extension = field(default_factory=dict)


def normalise_key_id(key_id: str) -> str:
    """A UUID in lower case with hyphens; any other printable ASCII name of 1-64 bytes as it is.

    Raises:
        BadAnswer: neither of both.
    """
    if not 1 <= len(key_id) <= 64 or not key_id.isascii() or not key_id.isprintable():
        raise BadAnswer("a key_ID that is not 1 to 64 printable ASCII characters")
    if len(key_id) == 36:
        try:
            return str(uuid.UUID(key_id))
        except ValueError:
            return key_id
    return key_id


def status_untrusted(body: bytes) -> StatusAnswer:
    """Raises :class:`BadAnswer` where the body is not a JSON object."""
    fields = _answer_object(body)
    extension = fields.get("status_extension")
    return StatusAnswer(
        _count(fields.get("stored_key_count")),
        _count(fields.get("key_size")),
        _count(fields.get("max_key_per_request")),
        extension if isinstance(extension, dict) else {},
    )


def container_untrusted(body: bytes, *, key_bytes: int) -> list[DeliveredKey]:
    """The keys of a container, each of exactly ``key_bytes`` bytes, no key_ID twice.

    Raises:
        BadAnswer: anything else; what was decoded by then is wiped.
    """
    fields = _answer_object(body)
    entries = fields.get("keys", fields.get("Keys"))
    if not isinstance(entries, list):
        raise BadAnswer('the KME\'s answer has no array "keys"')
    delivered: list[DeliveredKey] = []
    try:
        delivered.extend(_entry_untrusted(entry, key_bytes) for entry in entries)
        if len({key.key_id for key in delivered}) != len(delivered):
            raise BadAnswer("the KME's answer has a key_ID twice")
    except BadAnswer:
        for key in delivered:
            wipe(key.material)
        raise
    return delivered


def error_text_untrusted(body: bytes) -> str:
    """What an error body says, for people: at most 200 printable characters, empty where there is nothing to say."""
    text: object = None
    try:
        fields = json.loads(body)
        if isinstance(fields, dict):
            text = fields.get("message", fields.get("detail"))
    except (ValueError, RecursionError):
        text = None  # HTML and the like tells an operator less than the status code
    if text is None:
        return ""
    words = text if isinstance(text, str) else json.dumps(text)
    return "".join(c if c.isprintable() else " " for c in words[:200]).strip()


def error_details_untrusted(body: bytes) -> Extension:
    """The name/value pairs of ``details``, merged; empty where there are none."""
    try:
        fields = json.loads(body)
        details = fields.get("details") if isinstance(fields, dict) else None
    except (ValueError, RecursionError):
        return {}
    merged: Extension = {}
    for pair in details if isinstance(details, list) else []:
        if isinstance(pair, dict):
            merged.update(pair)
    return merged


def _answer_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer("the KME's answer is not JSON") from None
    if not isinstance(fields, dict):
        raise BadAnswer("the KME's answer is not a JSON object")
    return fields


def _entry_untrusted(entry: object, key_bytes: int) -> DeliveredKey:
    if not isinstance(entry, dict):
        raise BadAnswer("the KME's answer has a key that is not an object")
    key_id, key, extension = entry.get("key_ID"), entry.get("key"), entry.get("key_extension")
    if not isinstance(key_id, str) or not isinstance(key, str):
        raise BadAnswer("the KME's answer has a key without key_ID or key")
    try:
        material = bytearray(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        raise BadAnswer("the KME's answer has a key that is not base64") from None
    if len(material) != key_bytes:
        wipe(material)
        raise BadAnswer(f"the KME's answer has a key of {8 * len(material)} bits, {8 * key_bytes} were asked for")
    return DeliveredKey(normalise_key_id(key_id), material, extension if isinstance(extension, dict) else {})


def _count(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    return None
