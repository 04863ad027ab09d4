"""One hop after the other: a share comes in under one link's pad and goes out under the next one's.

The rules that matter:

- units are deleted, on the disk, before what they mask leaves; a retry draws new ones;
- the receiver deletes its copies before it acknowledges;
- a message that came before costs nothing and is acknowledged again; the same share under another pad costs that pad;
- nothing of a share is on the disk: a node that dies loses it, and the ends begin anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from keysource.base import wipe
from keysource.kme.records import StoreError
from keysource.network import crashes, onetime
from keysource.network.core import HOP_ATTEMPTS, HOP_RETRY, KEPT, LACKING_WAIT, MOST_KEPT, Core
from keysource.network.errors import Lacking, NetworkError, NotAuthentic, TooFew
from keysource.network.messages import Ack, BadMessage, Header, Share, Void

_PLENTY = 8
Name = tuple[str, int, tuple[str, ...]]
"""(transfer, index of the path, path): what a corrupt node sends under another path's name meets no right share."""


@dataclass(slots=True)
class Passing:
    """A share at this node: what it holds, from whom it came, how far it is to the next one."""

    header: Header
    """As it came; at the initiator as it would have come."""
    wrapped: bytes = field(repr=False)
    place: int
    """Of this node on the path."""
    until: float
    got_attempt: int = 0
    got_mac: str = ""
    """The unit that names the one message it came in: a sender that was started anew counts attempts from 1."""
    attempt: int = 0
    link: str = ""
    """Over which it was sent last."""
    next_try: float | None = None
    """When to send (again); None: not to be sent, or acknowledged."""

    @property
    def name(self) -> Name:
        return _name(self.header)

    @property
    def following(self) -> str | None:
        path = self.header.path
        return path[self.place + 1] if self.place + 1 < len(path) else None


def _name(header: Header) -> Name:
    return header.transfer, header.index, header.path


class Relays:
    """All shares that are at this node."""

    def __init__(
        self,
        core: Core,
        arrived: Callable[[Header, bytes, float], None],
        failed: Callable[[Ack, float], None],
    ) -> None:
        """``arrived``: a share whose path ends here.  ``failed``: one of ours did not get through."""
        self._core, self._arrived, self._failed = core, arrived, failed
        self._passing: dict[Name, Passing] = {}

    def begin(self, header: Header, wrapped: bytes, now: float) -> None:
        """The initiator's share sets out."""
        self._passing[_name(header)] = passing = Passing(header, wrapped, 0, now + KEPT)
        self._send(passing, now)

    def forget(self, transfer: str) -> None:
        for name in [name for name in self._passing if name[0] == transfer]:
            del self._passing[name]

    def next_time(self) -> float | None:
        times = [p.until if p.next_try is None else p.next_try for p in self._passing.values()]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        for passing in list(self._passing.values()):
            if passing.next_try is not None and now >= passing.next_try:
                self._send(passing, now)
            if now >= passing.until:
                self._passing.pop(passing.name, None)

    # What comes

    def receive(self, sender: str, share: Share, now: float) -> None:
        """Raises :class:`BadMessage` where it does not fit the map."""
        crashes.at("share.asked")
        header = share.header
        self._check(sender, share)
        known = self._passing.get(_name(header))
        if known is not None and known.got_mac == header.mac:
            self._answer(sender, header, "relayed")
            return
        self._core.fault.received(header.model_dump(), share.masked)
        try:
            wrapped = self._unmasked(share)
        except Lacking as lacking:
            self._answer(sender, header, "key not present", "", lacking.first_block, lacking.next_block)
            return
        except NetworkError as error:
            self._refuse(sender, header, str(error))
            return
        if known is not None and known.wrapped != wrapped:
            self._refuse(sender, header, "the same share came with another content")
            return
        self._take(sender, header, wrapped, known, now)

    def acknowledged(self, sender: str, ack: Ack, now: float) -> None:
        """What the next node says.  What does not fit, or is late, is dropped."""
        found = [
            p for p in self._passing.values() if p.name[:2] == (ack.transfer, ack.index) and p.following == sender
        ]
        for passing in found:
            self._said(passing, sender, ack, now)

    def _said(self, passing: Passing, sender: str, ack: Ack, now: float) -> None:
        if ack.status == "failed":
            beyond = list(itertools.pairwise(passing.header.path))[passing.place :]
            here = (self._core.name, sender)  # a node may blame only what lies behind it
            self._fail(passing, ack.message, ack.at if ack.at in beyond else here, now)
        elif passing.next_try is not None and ack.attempt == passing.attempt:
            if ack.status == "relayed":
                passing.next_try = None
            else:
                if ack.first_block:
                    self._core.store.void(passing.link, ack.first_block, own_only=True)
                passing.next_try = now + LACKING_WAIT

    def void(self, sender: str, void: Void) -> None:
        """Only the one who began a transfer can end it."""
        for passing in list(self._passing.values()):
            if passing.header.transfer == void.transfer and passing.header.path[0] == sender:
                del self._passing[passing.name]

    def _check(self, sender: str, share: Share) -> None:
        header, topology = share.header, self._core.topology
        connection = topology.connection_named(header.connection)
        if connection is None or header.index >= connection.paths:
            raise BadMessage("no such connection or path")
        if mistake := topology.path_mistake(connection, header.path):
            raise BadMessage(mistake)
        if header.path[header.hop : header.hop + 2] != (sender, self._core.name):
            raise BadMessage("this hop of the path does not lead from you to me")
        if header.link not in [link.name for link in topology.links_between(sender, self._core.name)]:
            raise BadMessage("the pad is of another link")
        if len(header.units) != onetime.units_for(len(share.masked)):
            raise BadMessage("the pad is longer than the share")

    def _unmasked(self, share: Share) -> bytes:
        """The units are gone, whatever comes of it.  Raises :class:`Lacking`, :class:`NotAuthentic`."""
        header = share.header
        if alarm := self._core.links[header.link].alarm:
            raise NetworkError(f"link {header.link!r} has an alarm ({alarm[:150]})")
        *pad, mac = units = self._core.store.spend(header.link, header.units)
        try:
            onetime.check(mac, header.encoded(), share.masked, share.tag)
            return bytes(onetime.mask(share.masked, pad))
        finally:
            for unit in units:
                wipe(unit)

    def _take(self, sender: str, header: Header, wrapped: bytes, known: Passing | None, now: float) -> None:
        self._answer(sender, header, "relayed")
        if known is not None:
            known.got_attempt, known.got_mac = header.attempt, header.mac
            return
        if len(self._passing) >= MOST_KEPT:
            self._passing.pop(next(iter(self._passing)))
        passing = Passing(header, wrapped, header.hop + 1, now + KEPT, header.attempt, header.mac)
        self._passing[passing.name] = passing
        self._core.tell(
            "relayed",
            connection=header.connection,
            block=header.block,
            keys=header.count,
            path=header.path,
            sender=sender,
            link=header.link,
            transfer=header.transfer,
        )
        if passing.following is None:
            self._arrived(header, wrapped, now)
            return
        fault = self._core.fault
        fault.copied(header.model_dump(), wrapped)
        if fault.alter:
            passing.wrapped = bytes([wrapped[0] ^ 1]) + wrapped[1:]
        if not fault.swallow:
            self._send(passing, now)

    def _refuse(self, sender: str, header: Header, reason: str) -> None:
        self._core.tell("refused", sender=sender, link=header.link, transfer=header.transfer, reason=reason)
        self._answer(sender, header, "failed", reason)

    def _answer(
        self, to: str, header: Header, status: str, message: str = "", first_block: int = 0, next_block: int = 0
    ) -> None:
        fields = {"transfer": header.transfer, "index": header.index, "attempt": header.attempt, "status": status}
        at = (to, self._core.name) if status == "failed" else ()
        rest = {"message": message[:300], "at": at, "first_block": first_block, "next_block": next_block}
        self._core.send(to, Ack.model_validate(fields | rest))

    # What goes

    def _send(self, passing: Passing, now: float) -> None:
        following = passing.following
        if following is None:
            return
        here = (self._core.name, following)
        link, trouble = self._link_to(following, onetime.units_for(len(passing.wrapped)))
        if not trouble and passing.attempt >= HOP_ATTEMPTS:
            trouble = f"{following!r} did not take the share"
        if trouble:
            self._fail(passing, trouble, here, now)
            return
        try:
            share = self._masked(passing, link)
        except (TooFew, StoreError) as error:
            self._fail(passing, str(error), here, now)
            return
        passing.next_try = now + HOP_RETRY * passing.attempt
        self._core.send(following, share)

    def _link_to(self, following: str, need: int) -> tuple[str, str]:
        """The link to send over, or why there is none: of several the one that is up and has more key."""
        found: list[tuple[bool, bool, int, str]] = []
        trouble = "there is no link"
        for link in self._core.topology.links_between(self._core.name, following):
            state = self._core.links[link.name]
            if state.alarm:
                trouble = f"link {link.name!r} has an alarm ({state.alarm[:150]})"
            elif not state.compared:
                trouble = f"link {link.name!r}: how far our units are used is not known yet"
            else:
                units = self._core.store.sendable(link.name, _PLENTY * need)
                found.append((units >= need, state.up, units, link.name))
        return (max(found)[-1], "") if found else ("", trouble)

    def _masked(self, passing: Passing, link: str) -> Share:
        """Under units that were deleted before.  Raises :class:`TooFew`."""
        drawn = self._core.store.draw(link, onetime.units_for(len(passing.wrapped)))
        (mac_name, mac), pad = drawn[-1], drawn[:-1]
        passing.attempt, passing.link = passing.attempt + 1, link
        header = passing.header.model_copy(
            update={
                "hop": passing.place,
                "attempt": passing.attempt,
                "link": link,
                "pad": tuple(name for name, _unit in pad),
                "mac": mac_name,
            }
        )
        try:
            masked = bytes(onetime.mask(passing.wrapped, [unit for _name, unit in pad]))
            return Share(header=header, masked=masked, tag=onetime.tag(mac, header.encoded(), masked))
        finally:
            for _name, unit in drawn:
                wipe(unit)

    def _fail(self, passing: Passing, message: str, at: tuple[str, ...], now: float) -> None:
        """Tell the one before, up to the initiator; it decides."""
        self._passing.pop(passing.name, None)
        header = passing.header
        ack = Ack(
            transfer=header.transfer,
            index=header.index,
            attempt=max(1, passing.got_attempt),
            status="failed",
            message=message[:300],
            at=at,
        )
        if passing.place == 0:
            self._failed(ack, now)
        else:
            self._core.send(header.path[passing.place - 1], ack)


__all__ = ["NotAuthentic", "Passing", "Relays"]
