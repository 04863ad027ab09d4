"""The table ``[carrier.quic]``, and a peer's ``carriers.quic``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvpn.netio.base import Address
from qvpn.transports.base import BadTransport
from qvpn.transports.quic.address import QuicAddress

LEAST_SIZE, DEFAULT_SIZE, MOST_SIZE = 1200, 1400, 9000
"""Bytes of UDP payload: every QUIC path carries the first (RFC 9000, 14)."""

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?\Z")


@dataclass(frozen=True)
class QuicSettings:
    """What is set for all connections of a site."""

    certificate: str = ""
    """File; empty: self-made at each start."""
    private_key: str = ""
    alpn: tuple[str, ...] = ("h3",)
    max_datagram_size: int = DEFAULT_SIZE
    server_name: str = "localhost"
    """Name in a certificate that is self-made."""


def parse_settings(table: Mapping[str, Any]) -> QuicSettings:
    """Raises :class:`BadTransport`."""
    known = {"certificate", "private_key", "alpn", "max_datagram_size", "server_name"}
    for key in table:
        if key not in known:
            raise BadTransport("there is no such setting", key=key)
    for key in ("certificate", "private_key"):
        if not isinstance(table.get(key, ""), str):
            raise BadTransport("name a file", key=key)
    if bool(table.get("certificate")) != bool(table.get("private_key")):
        missing = "private_key" if table.get("certificate") else "certificate"
        raise BadTransport("certificate and private_key go together", key=missing)
    size = table.get("max_datagram_size", DEFAULT_SIZE)
    if not isinstance(size, int) or isinstance(size, bool) or not LEAST_SIZE <= size <= MOST_SIZE:
        raise BadTransport(f"write a number from {LEAST_SIZE} to {MOST_SIZE}", key="max_datagram_size")
    alpn = table.get("alpn", ["h3"])
    words = [alpn] if isinstance(alpn, str) else alpn
    if not isinstance(words, list | tuple) or not words or not all(_is_alpn(word) for word in words):
        raise BadTransport('write one or more protocol names, such as ["h3"]', key="alpn")
    return QuicSettings(
        certificate=table.get("certificate", ""),
        private_key=table.get("private_key", ""),
        alpn=tuple(words),
        max_datagram_size=size,
        server_name=_host_name(table.get("server_name", "localhost")),
    )


def parse_peer(place: Address, table: Mapping[str, Any]) -> QuicAddress:
    """The address of a peer whose ``carriers.quic`` table this is.  Raises :class:`BadTransport`."""
    for key in table:
        if key not in ("server_name", "pin"):
            raise BadTransport("there is no such setting", key=key)
    name = table.get("server_name")
    return QuicAddress(
        place.ip,
        place.port,
        place.scope,
        dial=True,
        server_name=None if name is None else _host_name(name),
        pin=_pin(table.get("pin")),
    )


def _is_alpn(word: object) -> bool:
    return isinstance(word, str) and word.isascii() and 0 < len(word) < 256


def _host_name(value: object) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise BadTransport("write a host name", key="server_name")
    return value


def _pin(value: object) -> bytes | None:
    if value is None:
        return None
    digits = value.replace(":", "").lower() if isinstance(value, str) else ""
    if re.fullmatch(r"[0-9a-f]{64}", digits) is None:
        raise BadTransport("write the SHA-256 of the certificate in 64 hexadecimal digits", key="pin")
    return bytes.fromhex(digits)
