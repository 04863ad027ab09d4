"""Explicit congestion notification through the tunnel, as RFC 6040: the sites' TCP hears of congestion between them.

On the way in the outer header gets the inner one's two bits as they are ("normal mode"; both ends are this program,
so the compatibility mode of RFC 6040 4.3 is never needed).  On the way out both are combined after figure 4 of the
RFC.  Two things change a packet: a router's CE mark goes into the inner header, and ECT(1) outside turns ECT(0)
inside into ECT(1).  A packet whose sender does not speak ECN but whose outer header is marked CE is dropped, as a
router would have had to do, and counted.  Outer bits are not authenticated: who can change them could as well have
dropped the packet.

The other six bits (DSCP) are not copied: the outer header would tell anyone on the path which record is a telephone
call and which a backup.  The inner DSCP arrives as it was sent.
"""

from __future__ import annotations

from qvpn.tunnel.drops import DropReason

NOT_ECT, ECT_1, ECT_0, CE = range(4)
"""The two bits, RFC 3168 5."""

MASK = 3

WAITED = CE | 4
"""As CE, but not a router says so: our own receive queue does (:mod:`qvpn.dataplane.arrivals`)."""


def field(data: memoryview | bytes, start: int) -> int:
    """ECN bits of the IP packet at ``start``, whose first two bytes must be there."""
    second = data[start + 1]
    return (second if data[start] >> 4 == 4 else second >> 4) & MASK


def combine(inner: int, outer: int) -> int | None:
    """What the inner bits become (RFC 6040, figure 4); None: the packet must be dropped."""
    if outer == CE:
        return CE if inner != NOT_ECT else None
    if outer == ECT_1 and inner == ECT_0:
        return ECT_1
    return inner


def changes(outer: int) -> int:
    """``outer`` where it can change an inner header, else 0: the caller of :func:`apply` may skip it then."""
    return outer if outer & MASK in (ECT_1, CE) else NOT_ECT


def lost(outer: int) -> DropReason:
    """Why a packet is dropped that :func:`apply` refused."""
    return DropReason.RECEIVE_QUEUE if outer == WAITED else DropReason.ECN_NOT_CAPABLE


def apply(data: memoryview, start: int, outer: int) -> bool:
    """Combine the outer bits into the IP packet at ``start``; False: it must be dropped.

    The packet may be a superpacket: then all its segments came with these outer bits.  No transport checksum covers
    the bits.
    """
    inner = field(data, start)
    combined = combine(inner, outer & MASK)
    if combined is None:
        return False
    if combined != inner:
        _set(data, start, inner, combined)
    return True


def _set(data: memoryview, start: int, old: int, new: int) -> None:
    if data[start] >> 4 == 6:
        data[start + 1] = data[start + 1] & 0xCF | new << 4
        return
    data[start + 1] += new - old
    # RFC 1624: the sum moves by what the word moved, so a header that was wrong stays wrong
    checksum = data[start + 10] << 8 | data[start + 11]
    total = (0xFFFF - checksum + new - old - 1) % 0xFFFF + 1
    data[start + 10], data[start + 11] = divmod(0xFFFF - total, 256)
