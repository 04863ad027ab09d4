"""Cookies: proof that whoever sends from an address also receives there (PROTOCOL.md, chapter 3)."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from qvpn.handshake.carrier import UdpAddress
from qvpn.wire.datagram import mac

RENEW = 120.0


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
