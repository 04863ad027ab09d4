"""A strict KME for people who write an SAE: it serves two SAEs from memory and notes what they do wrong.

Its keys come from the operating system; nothing is stored, and it is no KME for anything but this.  Between right
answers it gives *lessons*: a 503, a connection that is reset after the key was taken, a redirect, a key that is too
short, bytes that came before.  What the SAE does next tells what it is made of.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, repeat
from typing import Any

from aiohttp import web

from keysource.etsi014 import messages
from keysource.etsi014.messages import Error, KeyContainer, KeyEntry, KeyIDs, KeyRequest, Status, to_json
from keysource.kme.auth import certificate_of, common_name
from keysource.kme.conform.report import plain
from keysource.kme.conform.rules import Book

KME_ID = "kme-strict"
KEY_SIZE, MIN_SIZE, MAX_SIZE, MOST = 256, 64, 1024, 8
MAX_SLAVES = 0
ELSEWHERE = "/elsewhere"
_MAX_BODY = 256 * 1024
_RETRY_AFTER = 1
_EARLY = 0.9  # of that many seconds: clocks differ
ENC_LESSONS = ("", "503", "", "reset", "", "redirect", "", "short", "", "repeat", "")
DEC_LESSONS = ("", "503", "", "reset", "", "redirect", "")
_REQUEST_FIELDS = {"number", "size", "additional_slave_SAE_IDs", "extension_mandatory", "extension_optional"}
_IDS_FIELDS, _ID_FIELDS = {"key_IDs", "key_IDs_extension"}, {"key_ID", "key_ID_extension"}


@dataclass(slots=True)
class _Key:
    master: str
    slave: str
    material: bytes = field(repr=False)
    spoilt: str = ""
    """The rule that the master breaks if the key is used all the same."""


@dataclass(slots=True)
class _Pupil:
    """What is remembered of one SAE."""

    enc: Iterator[str]
    dec: Iterator[str]
    not_before: dict[str, float] = field(default_factory=dict)
    """By method: when it may come again."""
    lost: set[str] = field(default_factory=set)
    """key_IDs of an answer that it never got."""
    had: set[str] = field(default_factory=set)
    last: bytes = field(default=b"", repr=False)


class Refusal(Exception):
    """400 with this message."""


class StrictKme:
    """See the module.  ``now`` gives seconds of a clock that does not jump."""

    def __init__(self, saes: tuple[str, str], book: Book, now: Callable[[], float], *, lessons: bool = True) -> None:
        self._saes, self._book, self._now = saes, book, now
        self._keys: dict[str, _Key] = {}
        self._pupils = {
            sae: _Pupil(cycle(ENC_LESSONS), cycle(DEC_LESSONS)) if lessons else _Pupil(repeat(""), repeat(""))
            for sae in saes
        }

    def application(self) -> web.Application:
        application = web.Application(client_max_size=_MAX_BODY, middlewares=[self._middleware])
        keys = "/api/v1/keys/{sae}"
        for method in ("GET", "POST"):
            application.router.add_route(method, keys + "/enc_keys", self._enc_keys)
            application.router.add_route(method, keys + "/dec_keys", self._dec_keys)
        application.router.add_get(keys + "/status", self._status, allow_head=False)
        return application

    # Every request

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        sae = _sae(request)
        if sae not in self._saes:
            said = f"the common name of its certificate is none of {', '.join(self._saes)}"
            self._book.broken(plain(sae, 40) or "(no name)", "tls", said)
            return web.Response(status=401)
        connection = request.get_extra_info("ssl_object")
        version = connection.version() if connection else "none"
        self._book.look(sae, "tls", "" if version in ("TLSv1.2", "TLSv1.3") else f"it came with {version}")
        if request.path.startswith(ELSEWHERE):
            self._book.broken(sae, "redirect", "it followed a 307 to another path")
            return _error(400, "nothing is here")
        try:
            answer: web.StreamResponse = await handler(request)
        except Refusal as refusal:
            return _error(400, str(refusal))
        except web.HTTPException as error:
            what = f"{request.method} {plain(request.raw_path, 100)}"
            self._book.broken(sae, "path", f"{error.status} for {what}")
            return _error(error.status, error.reason)
        self._book.kept(sae, "path")
        return answer

    def _look_at_patience(self, sae: str, method: str) -> None:
        until = self._pupils[sae].not_before.pop(method, None)
        if until is not None:
            early = until - self._now()
            said = f"{method} again {early:.2f} s too early" if early > (1 - _EARLY) * _RETRY_AFTER else ""
            self._book.look(sae, "patience", said)

    def _other(self, request: web.Request, sae: str) -> str:
        """The SAE of the path; must be the other one of the two."""
        name = request.match_info["sae"]
        other = self._saes[1 - self._saes.index(sae)]
        if name != other:
            self._book.broken(sae, "slave", f"the path names {plain(name, 40)!r}; it may share with {other!r}")
            raise Refusal(f"no KME is known that serves the slave SAE {name[:64]!r}")
        self._book.kept(sae, "slave")
        return other

    # The three methods

    async def _status(self, request: web.Request) -> web.Response:
        sae = _sae(request)
        other = self._other(request, sae)
        status = Status(
            source_KME_ID=KME_ID,
            target_KME_ID=KME_ID,
            master_SAE_ID=sae,
            slave_SAE_ID=other,
            key_size=KEY_SIZE,
            stored_key_count=1000,
            max_key_count=1000,
            max_key_per_request=MOST,
            max_key_size=MAX_SIZE,
            min_key_size=MIN_SIZE,
            max_SAE_ID_count=MAX_SLAVES,
        )
        return web.Response(body=to_json(status), content_type="application/json")

    async def _enc_keys(self, request: web.Request) -> web.StreamResponse:
        sae = _sae(request)
        self._look_at_patience(sae, "enc_keys")
        other = self._other(request, sae)
        asked = self._get_request(request, sae) if request.method == "GET" else await self._post_request(request, sae)
        size = KEY_SIZE if asked.size is None else asked.size
        self._look_at_bounds(sae, asked, size)
        lesson = next(self._pupils[sae].enc)
        if (early := self._before_anything(request, sae, lesson)) is not None:
            return early
        entries = []
        for _ in range(asked.number):
            key_id, material = str(uuid.uuid4()), secrets.token_bytes(size // 8)
            entries.append((key_id, self._made(sae, other, key_id, material, lesson)))
        return _cut(request) if lesson == "reset" else _container(entries)

    def _made(self, sae: str, other: str, key_id: str, material: bytes, lesson: str) -> bytes:
        """Note a key for its slave; the bytes that the master gets."""
        pupil, spoilt, shown = self._pupils[sae], "", material
        if lesson == "short":
            spoilt, shown = "length", material[: len(material) // 2]
        elif lesson == "repeat" and len(pupil.last) == len(material):
            spoilt, shown = "equal", pupil.last
        pupil.last = material
        self._keys[key_id] = _Key(sae, other, material, spoilt)
        if spoilt:
            self._book.kept(sae, spoilt)
        return shown

    async def _dec_keys(self, request: web.Request) -> web.StreamResponse:
        sae = _sae(request)
        self._look_at_patience(sae, "dec_keys")
        master = self._other(request, sae)
        key_ids = self._get_ids(request, sae) if request.method == "GET" else await self._post_ids(request, sae)
        self._look_at_ids(sae, master, key_ids)
        found = [self._keys.get(key_id) for key_id in key_ids]
        if any(key is None or (key.master, key.slave) != (master, sae) for key in found):
            raise Refusal(messages.KEYS_NOT_FOUND)
        lesson = next(self._pupils[sae].dec)
        if (early := self._before_anything(request, sae, lesson)) is not None:
            return early
        keys = [(key_id, self._keys.pop(key_id)) for key_id in key_ids]
        for _key_id, key in keys:
            if key.spoilt:
                what = "that was too short" if key.spoilt == "length" else "whose bytes had come before"
                self._book.broken(key.master, key.spoilt, f"it used a key {what}: its slave fetched it")
        pupil = self._pupils[sae]
        if lesson == "reset":
            pupil.lost.update(key_ids)
            return _cut(request)
        pupil.had.update(key_ids)
        return _container([(key_id, key.material) for key_id, key in keys])

    def _before_anything(self, request: web.Request, sae: str, lesson: str) -> web.Response | None:
        """Answers that consume nothing."""
        if lesson == "503":
            self._pupils[sae].not_before[request.path.rpartition("/")[2]] = self._now() + _RETRY_AFTER
            answer = _error(503, "no key now")
            answer.headers["Retry-After"] = str(_RETRY_AFTER)
            return answer
        if lesson == "redirect":
            self._book.kept(sae, "redirect")
            return web.Response(status=307, headers={"Location": ELSEWHERE + request.path})
        return None

    # What it asks, and how

    def _get_request(self, request: web.Request, sae: str) -> KeyRequest:
        values: dict[str, Any] = {}
        for name in request.query:
            given = request.query.getall(name)
            if name not in ("number", "size") or len(given) != 1 or not given[0].isdigit() or len(given[0]) > 9:
                self._book.broken(sae, "get", f"enc_keys by GET with {plain(request.query_string, 60)!r}")
                raise Refusal("a GET may carry number and size, once each; all else needs a POST")
            values[name] = int(given[0])
        self._book.kept(sae, "get")
        return KeyRequest(**values)

    def _get_ids(self, request: web.Request, sae: str) -> list[str]:
        given = request.query.getall("key_ID", [])
        if len(given) != 1 or set(request.query) != {"key_ID"}:
            self._book.broken(sae, "get", f"dec_keys by GET with {plain(request.query_string, 60)!r}")
            raise Refusal("a GET carries exactly one key_ID")
        self._book.kept(sae, "get")
        return [self._uuid(sae, given[0])]

    async def _post_request(self, request: web.Request, sae: str) -> KeyRequest:
        fields = await self._object(request, sae)
        self._look_at_fields(sae, fields, _REQUEST_FIELDS)
        asked: KeyRequest = self._checked(sae, json.dumps(fields).encode(), messages.request_untrusted)
        for extension in (*asked.extension_mandatory, *asked.extension_optional):
            for name in extension:
                said = "" if "_" in name[1:] else f"an extension parameter {plain(name, 40)!r} without prefix"
                self._book.look(sae, "vendor", said)
        if asked.extension_mandatory:
            raise Refusal(messages.MANDATORY_UNSUPPORTED)
        return asked

    async def _post_ids(self, request: web.Request, sae: str) -> list[str]:
        fields = await self._object(request, sae)
        self._look_at_fields(sae, fields, _IDS_FIELDS)
        asked: KeyIDs = self._checked(sae, json.dumps(fields).encode(), messages.key_ids_untrusted)
        for entry in fields["key_IDs"]:
            self._look_at_fields(sae, entry, _ID_FIELDS)
        return [self._uuid(sae, entry.key_ID) for entry in asked.key_IDs]

    async def _object(self, request: web.Request, sae: str) -> dict[str, Any]:
        """The body of a POST; an empty one of enc_keys asks for what an empty object does."""
        raw = await request.read()
        said = "" if request.content_type == "application/json" else f"Content-Type {request.content_type[:40]!r}"
        try:
            fields = json.loads(raw.decode() or "{}")
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            said = "a body that is no JSON object"
        self._book.look(sae, "body", said)
        if not isinstance(fields, dict):
            raise Refusal("the body is not a JSON object")
        return fields

    def _checked(self, sae: str, body: bytes, read: Callable[[bytes], Any]) -> Any:
        try:
            asked = read(body)
        except ValueError as error:
            self._book.broken(sae, "types", plain(str(error)))
            raise Refusal(str(error)) from None
        self._book.kept(sae, "types")
        return asked

    def _look_at_fields(self, sae: str, fields: dict[str, Any], known: set[str]) -> None:
        others = sorted(set(fields) - known)
        self._book.look(sae, "fields", f"also {plain(', '.join(others), 80)}" if others else "")

    def _look_at_bounds(self, sae: str, asked: KeyRequest, size: int) -> None:
        said = ""
        if size % 8 or not MIN_SIZE <= size <= MAX_SIZE:
            said = f"a size of {size} where {MIN_SIZE} to {MAX_SIZE} are served, multiples of 8"
        elif not 1 <= asked.number <= MOST:
            said = f"{asked.number} keys where max_key_per_request is {MOST}"
        elif len(asked.additional_slave_SAE_IDs) > MAX_SLAVES:
            said = f"additional_slave_SAE_IDs where max_SAE_ID_count is {MAX_SLAVES}"
        self._book.look(sae, "bounds", said)
        if said:
            raise Refusal(messages.SIZE_NOT_MULTIPLE if size % 8 else said)

    def _look_at_ids(self, sae: str, master: str, key_ids: list[str]) -> None:
        pupil = self._pupils[sae]
        if not key_ids or len(set(key_ids)) != len(key_ids):
            self._book.broken(sae, "own", "no key_ID, or one twice in a request")
            raise Refusal(messages.KEYS_NOT_FOUND)
        if again := [key_id for key_id in key_ids if key_id in pupil.had]:
            self._book.broken(sae, "once", f"asked again for {len(again)} key_IDs that it was given")
        elif lost := pupil.lost.intersection(key_ids):
            self._book.broken(sae, "lost", f"asked again for {len(lost)} key_IDs after the connection was reset")
        elif strange := [key_id for key_id in key_ids if self._is_not_for(sae, master, key_id)]:
            self._book.broken(sae, "own", f"{len(strange)} key_IDs that were not drawn for it by {master!r}")
        else:
            self._book.kept(sae, "own", "once")
            if pupil.lost:
                self._book.kept(sae, "lost")

    def _is_not_for(self, sae: str, master: str, key_id: str) -> bool:
        key = self._keys.get(key_id)
        return key is None or (key.master, key.slave) != (master, sae)

    def _uuid(self, sae: str, text: str) -> str:
        try:
            return str(uuid.UUID(text))
        except ValueError:
            self._book.broken(sae, "types", f"key_ID {plain(text, 40)!r} is not a UUID")
            raise Refusal(messages.KEYS_NOT_FOUND) from None


def _sae(request: web.Request) -> str:
    """Who calls, by the common name; empty where there is none."""
    return common_name(certificate_of(request)) or ""


def _container(keys: list[tuple[str, bytes]]) -> web.Response:
    entries = [KeyEntry(key_ID=key_id, key=base64.b64encode(material).decode()) for key_id, material in keys]
    body = to_json(KeyContainer(keys=entries))
    return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


def _error(status: int, message: str) -> web.Response:
    return web.Response(status=status, body=to_json(Error(message=message)), content_type="application/json")


def _cut(request: web.Request) -> web.Response:
    """The key is gone, and so is the connection."""
    if (transport := request.transport) is not None:
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    return web.Response(status=503)
