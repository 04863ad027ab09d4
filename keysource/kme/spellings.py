"""How answers of other KMEs look that were seen in the field, for the faults ``vendor-*``: an SAE should bear them.

Statuses other than the standard's 400 (404, 410, 422), errors under ``detail`` or in HTML, optional fields that are
``null`` rather than absent, fields that the standard does not have, key_IDs in upper case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from keysource.kme.faults import Fault

_STATUS = {Fault.VENDOR_404: 404, Fault.VENDOR_410: 410, Fault.VENDOR_422: 422}
_HTML = "<!DOCTYPE html>\n<html><head><title>{0}</title></head><body><h1>Error {0}</h1></body></html>\n"


def respelled(fault: Fault, answer: web.Response) -> web.Response:
    """The answer in that KME's words; the same object where the fault is none of spelling."""
    if answer.status == 400 and fault in _STATUS:
        return _like(answer, _STATUS[fault], answer.body)
    if answer.status != 200 and fault is Fault.VENDOR_DETAIL:
        return _like(answer, answer.status, _json({"detail": _message(answer)}))
    if answer.status != 200 and fault is Fault.VENDOR_HTML:
        return _like(answer, answer.status, _HTML.format(answer.status).encode(), "text/html")
    if answer.status == 200 and fault is Fault.VENDOR_NULL:
        return _changed(answer, _with_nulls)
    if answer.status == 200 and fault is Fault.VENDOR_UPPER:
        return _changed(answer, _in_upper_case)
    return answer


def _like(answer: web.Response, status: int, body: Any, content_type: str = "application/json") -> web.Response:
    names = ("Retry-After", "Cache-Control", "Allow")
    kept = {name: answer.headers[name] for name in names if name in answer.headers}
    return web.Response(status=status, body=body, content_type=content_type, headers=kept)


def _changed(answer: web.Response, change: Callable[[dict[str, Any]], None]) -> web.Response:
    fields = json.loads(_bytes(answer))
    change(fields)
    return _like(answer, answer.status, _json(fields))


def _with_nulls(fields: dict[str, Any]) -> None:
    if "keys" in fields:
        fields |= {"key_container_extension": None, "vendor_certificate_extension": {"serial": 7}}
        for key in fields["keys"]:
            key |= {"key_ID_extension": None, "key_extension": None, "vendor_state": "active"}
    else:
        fields |= {"status_extension": None, "vendor_uptime": 12.5}


def _in_upper_case(fields: dict[str, Any]) -> None:
    for key in fields.get("keys", ()):
        key["key_ID"] = key["key_ID"].upper()


def _message(answer: web.Response) -> str:
    body = _bytes(answer)
    return str(json.loads(body)["message"]) if body else "Unauthorized"


def _bytes(answer: web.Response) -> bytes:
    body = answer.body
    assert body is None or isinstance(body, bytes | bytearray)
    return bytes(body or b"")


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
