"""Durations, addresses with ports, and names, as people write them in a configuration."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fractions import Fraction

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)}
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", re.ASCII)


def parse_duration(value: object) -> float:
    """Seconds of ``"60s"``, ``"500ms"``, ``"5m"``, ``"1h"`` or ``"2d"``.  Raises ValueError with a sentence."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('write a duration such as "60s", "5m" or "1h"')
    return float(Fraction(match[1]) * _SECONDS[match[2]])


def show_duration(seconds: float) -> str:
    """``90`` as ``"90s"``, ``300`` as ``"5m"``: the largest unit that leaves a whole number."""
    for unit in ("d", "h", "m"):
        size = int(_SECONDS[unit])
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


@dataclass(frozen=True, slots=True)
class HostPort:
    """``HOST:PORT``; ``host`` is a name or an IP address without brackets."""

    host: str
    port: int

    @property
    def ip(self) -> IPAddress | None:
        """The address, or None where ``host`` is a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(value: object) -> HostPort:
    """``"192.0.2.2:51840"``, ``"[2001:db8::2]:51840"`` or ``"gw.example:51840"``.  Raises ValueError."""
    example = 'write "HOST:PORT", with an IPv6 address in brackets'
    if not isinstance(value, str):
        raise ValueError(example)
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError(example)
    if not 1 <= int(port[:6]) <= 65535:
        raise ValueError("a port is a number from 1 to 65535")
    return HostPort(parse_host(host), int(port))


def parse_host(host: str) -> str:
    """A name, an IPv4 address or a bracketed IPv6 address; the result has no brackets.  Raises ValueError."""
    if host.startswith("[") and host.endswith("]"):
        bare = host[1:-1]
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(f"{bare!r} is not an IPv6 address") from None
        return bare
    if ":" in host:
        raise ValueError("an IPv6 address stands in brackets: [ADDRESS]:PORT")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(f"{host!r} is not an IPv4 address") from None
    if not 1 <= len(host) <= 253 or not all(_HOST_LABEL.fullmatch(part) for part in host.split(".")):
        raise ValueError(f"{host!r} is neither an IP address nor a host name")
    return host


def parse_listen(value: object) -> HostPort:
    """Like :func:`parse_host_port`, but the host must be an address of this machine.  Raises ValueError."""
    place = parse_host_port(value)
    if place.ip is None:
        raise ValueError(f'{place.host!r} is a name: listen needs an address, such as "[::]:51840"')
    return place


def parse_network(value: object) -> IPNetwork:
    """A network without host bits, such as ``10.20.0.0/16``.  Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError('write networks such as "10.20.0.0/16"')
    try:
        exact = ipaddress.ip_network(value)
    except ValueError:
        try:
            meant = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ValueError(f"{value!r} is not an IP network") from None
        raise ValueError(f'{value!r} has bits behind its prefix; did you mean "{meant}"?') from None
    if exact.prefixlen == 0:
        raise ValueError(
            f"{value!r} is a default route, and qvpn joins sites: it would carry the tunnel's own datagrams; "
            "name the peer's networks instead"
        )
    return exact


def parse_name(value: object) -> str:
    """A site, peer or key source name.  Raises ValueError."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError("a name has 1 to 32 letters, digits, '-', '_' or '.', and starts with a letter or digit")
    return value
