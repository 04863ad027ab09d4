"""Cookies: proof that whoever sends from an address also receives there (PROTOCOL.md, chapter 3)."""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable

from qvpn.handshake.carrier import UdpAddress
from qvpn.wire.datagram import mac

RENEW = 120.0
KEPT = 8
"""Cookies that an initiator keeps, as many as it takes in a second: where there is no PSK an observer may have forged
all but one of them."""


def address_bytes(address: UdpAddress) -> bytes:
    """16 bytes of IP (IPv4 mapped into IPv6) and u16 port."""
    ip = address.ip
    packed = bytes(10) + b"\xff\xff" + ip.packed if isinstance(ip, ipaddress.IPv4Address) else ip.packed
    return packed + address.port.to_bytes(2, "big")


class CookieJar:
    """The secrets behind our cookies: one for 120 s, and the one before."""

    def __init__(self, token: Callable[[int], bytes], now: float) -> None:
        self._token = token
        self._secrets = [token(32)]
        self._renew_at = now + RENEW

    def _renew(self, now: float) -> None:
        if now < self._renew_at:
            return
        stale = now >= self._renew_at + RENEW
        self._secrets = [self._token(32)] if stale else [self._token(32), self._secrets[0]]
        self._renew_at = now + RENEW

    def cookie(self, address: UdpAddress, now: float) -> bytes:
        """16 bytes for RETRY."""
        self._renew(now)
        return mac(self._secrets[0], address_bytes(address))

    def valid(self, address: UdpAddress, now: float) -> tuple[bytes, ...]:
        """The cookies that this address may use now."""
        self._renew(now)
        name = address_bytes(address)
        return tuple(mac(secret, name) for secret in self._secrets)


class CookieBox:
    """The cookies that a peer gave us for its address, newest first; each lives 120 s."""

    def __init__(self) -> None:
        self._cookies: deque[tuple[bytes, float]] = deque(maxlen=KEPT)
        self._turn = 0
        self._used = b""

    def add(self, cookie: bytes, now: float) -> None:
        self._cookies.appendleft((cookie, now + RENEW))

    def clear(self) -> None:
        """The peer's address has changed: what it gave us there is worth nothing here."""
        self._cookies.clear()

    def newest(self, now: float) -> bytes | None:
        return self._choose(0, now)

    def next(self, now: float) -> bytes | None:
        """Another at each call, whatever is added meanwhile: else a forger whose RETRY always comes last would have
        none but its own tried."""
        self._turn += 1
        return self._choose(self._turn, now)

    def worked(self) -> None:
        """The peer took what the one used last was in: it counts as the newest."""
        for each in tuple(self._cookies):
            if each[0] == self._used:
                self._cookies.remove(each)
                self._cookies.appendleft(each)
                return

    def _choose(self, turn: int, now: float) -> bytes | None:
        live = [cookie for cookie, until in self._cookies if now < until]
        self._used = live[turn % len(live)] if live else b""
        return self._used or None
