"""MSS clamp: a TCP connection through the tunnel begins with segments that its path carries.

The maximum segment size that a host announces in its SYN is lowered where the packet would be longer than the path
allows, in SYNs and SYN-ACKs, to the peer and from it.  It is never raised, and no option is added (RFC 9293, 3.7.1;
RFC 4459, 3.2).  The checksum is mended, not computed anew, so a wrong one stays wrong; a partial one
(virtio NEEDS_CSUM) does not cover the options yet and is left alone.
"""

from __future__ import annotations

from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER
from qvpn.tunnel import ip

_TCP_HEADER = 20
SYN = 0x02
_END, _NOTHING, _MSS = 0, 1, 2


def may_be_tcp(data: memoryview, inner: int) -> bool:
    """True for all TCP, and for little else."""
    return data[inner + 9] == ip.TCP or data[inner + 6] == ip.TCP


def is_syn(data: memoryview | bytes, inner: int, end: int) -> bool:
    """Quick look before :func:`clamp`: False for nearly all that is no SYN.

    The caller knows that it may be TCP (:func:`may_be_tcp`); behind IPv6 extension headers it is never looked for.
    """
    if data[inner] == 0x45:
        return end > inner + 33 and bool(data[inner + 33] & SYN)
    return data[inner] >> 4 == 4 or (end > inner + 53 and bool(data[inner + 53] & SYN))


def clamp(data: memoryview, start: int, end: int, mtu: int) -> bool:
    """Lower the MSS of the packet behind the virtio header at ``start`` to what ``mtu`` allows; True if changed."""
    inner = start + VNET_HEADER
    found = ip.transport(data, inner, end)
    if found is None or found[0] != ip.TCP:
        return False
    tcp = inner + found[1]
    if end - tcp < _TCP_HEADER or not data[tcp + 13] & SYN:
        return False
    place = _mss(data, tcp, min(end, tcp + (data[tcp + 12] >> 4) * 4))
    wanted = mtu - (ip.IPV4_HEADER if data[inner] >> 4 == 4 else ip.IPV6_HEADER) - _TCP_HEADER
    if not place or not 0 < wanted < (said := data[place] << 8 | data[place + 1]):
        return False
    data[place : place + 2] = wanted.to_bytes(2, "big")
    if data[start] != offload.NEEDS_CSUM:
        _mend(data, tcp + 16, said, wanted, odd=bool((place - tcp) & 1))
    return True


def _mss(data: memoryview, tcp: int, end: int) -> int:
    """Where the value of the MSS option stands; 0 if there is none, or the options are broken before it."""
    position = tcp + _TCP_HEADER
    while position < end and data[position] != _END:
        if data[position] == _NOTHING:
            position += 1
            continue
        length = data[position + 1] if position + 1 < end else 0
        if length < 2 or position + length > end:
            return 0
        if data[position] == _MSS and length == 4:
            return position + 2
        position += length
    return 0


def _mend(data: memoryview, place: int, old: int, new: int, *, odd: bool) -> None:
    """RFC 1624, equation 3; a value at an odd place counts with its bytes swapped."""
    if odd:
        old, new = _swapped(old), _swapped(new)
    total = (~(data[place] << 8 | data[place + 1]) & 0xFFFF) + (~old & 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    data[place : place + 2] = (~total & 0xFFFF).to_bytes(2, "big")


def _swapped(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8
