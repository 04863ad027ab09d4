"""What one KME knows and does: its store, the state of its links, and how a key is issued, reserved and fetched.

No HTTP here.  What it stands on is in :mod:`~keysource.kme.ground`, the master's side in
:mod:`~keysource.kme.issuing`; here are the slave's side, what the devices say, and what is to be done now and then.
"""

from __future__ import annotations

import math
import time
from dataclasses import astuple, replace
from functools import partial

import structlog

from keysource.kme.config import KmeConfig
from keysource.kme.ground import link_row
from keysource.kme.issuing import Issuing
from keysource.kme.keystore import KeyStore
from keysource.kme.links import LinkState, links_to
from keysource.kme.peering import PeerClient
from keysource.kme.records import Counts, Deposit, LinkRow, Offer, Reservation, StoredKey, StoreError, Terms

MANY, COUNT_AGAIN = 4096, 0.5
"""Keys of a large stock, and seconds for which its count is good enough for an SAE's status."""
log = structlog.get_logger("kme")


def _withdraw(store: KeyStore, stock: str, tokens: list[str]) -> int:
    return store.withdraw(stock, tokens)


class Site(Issuing):
    """See the module."""

    def __init__(self, config: KmeConfig, peers: dict[str, PeerClient]) -> None:
        super().__init__(config, peers)
        self._counted: dict[str, tuple[float, Counts]] = {}

    # What is there

    async def follow_links(self) -> None:
        """What other processes at the same store have heard of the devices that they have."""
        for link in self.config.link:
            state = self.links[link.stock]
            row = await self.db(partial(link_row, peer=link.stock))
            if link.device is None:
                state.trouble = "another process of the site has the device"
                state.alarms = {"last known": row.alarm} if row and row.alarm else {}
            state.row = row or state.row

    async def counts_for_saes(self, peer: str) -> Counts:
        """The same for a status that many ask for.  Counting takes milliseconds where there is much: of more than
        :data:`MANY` keys the count may be up to :data:`COUNT_AGAIN` seconds old."""
        at, counted = self._counted.get(peer, (-math.inf, None))
        if counted is None or time.monotonic() >= at + COUNT_AGAIN or counted.own_free + counted.peer_free <= MANY:
            counted = await self.counts(peer)
            self._counted[peer] = time.monotonic(), counted
        return counted

    async def summary(self, peer: str) -> tuple[LinkState, Counts]:
        """What an SAE is told of all links to a KME: of the key of those without an alarm, and of an alarm only where
        all have one."""
        links = links_to(self.links, peer)
        well = [link for link in links if not link.alarm] or links
        counted = [await self.counts_for_saes(link.stock) for link in well]
        if len(well) == 1:
            return well[0], counted[0]
        rates = [link.key_rate for link in well if link.key_rate is not None]
        place = max(range(len(well)), key=lambda place: counted[place].own_free)
        total = Counts(*(sum(column) for column in zip(*map(astuple, counted), strict=True)))
        return replace(well[place], key_rate=sum(rates) if rates else None), total

    async def counts(self, peer: str) -> Counts:
        return await self.db(lambda store: store.counts(peer))

    # What is to be done now and then

    async def expire(self) -> int:
        """Forget reservations whose slave never came.  Returns how many."""
        limit = time.time() - self.config.limits.reserved_for
        if gone := await self.db(lambda store: store.expire(limit)):
            log.warning("reserved keys expired, their slave SAE never fetched them", count=gone)
        return gone

    async def turn_epoch(self) -> None:
        """Begin a new epoch where it is time for one; wrap anew what old ones wrapped, and destroy those."""
        while await self.db(lambda store: store.rewrap()):
            pass  # requests come between; and no new epoch before the last one's rows have followed
        now = time.time()
        _number, begun = await self.db(lambda store: store.epoch)
        if not begun <= now < begun + self.config.limits.key_epoch:
            await self.db(lambda store: store.begin_epoch(now))
            while await self.db(lambda store: store.rewrap()):
                pass

    # Slave's side

    async def reserve(self, stock: str, terms: Terms, offers: list[Offer]) -> Reservation:
        """The other KME is about to issue these keys.  ``NotNow`` while our device reports an alarm."""
        if self.well(stock).row is None:
            return Reservation([unit.key_id for offer in offers for unit in offer.units], 0, 0)
        now = time.time()
        return await self.db(lambda store: store.reserve(stock, terms, offers, now))

    async def deposit(self, stock: str, terms: Terms, deposits: list[Deposit]) -> Reservation:
        """The same for keys of another link.  Raises :class:`NotNow`, :class:`~keysource.kme.records.BadDeposit`."""
        self.well(stock)
        now = time.time()
        return await self.db(lambda store: store.deposit(stock, terms, deposits, now))

    async def withdrawn(self, peer: str, tokens: list[str]) -> int:
        """The other KME will not issue these.  Returns how many are gone."""
        gone = 0
        for link in links_to(self.links, peer):
            gone += await self.db(partial(_withdraw, stock=link.stock, tokens=tokens))
        return gone

    async def fetch(self, master: str, slave: str, key_ids: list[str]) -> list[StoredKey]:
        """Raises :class:`NotTheSlave` or :class:`KeysNotFound`; then nothing is gone."""
        # Asked now, not when the key was reserved: a day may lie between, and the configuration may be another.
        sae = self.config.local_sae(slave)
        may = sae is not None and master in sae.may_share_with
        return await self.db(lambda store: store.fetch(master, slave, key_ids, may=may))

    # What the device says

    async def bind(self, link: LinkRow) -> LinkRow:
        """Raises :class:`~keysource.kme.store.StoreError` where the device is another end or another link."""
        for other in self.links.values():
            if other.stock != link.peer and other.row is not None and other.row.name == link.name:
                raise StoreError(f"the devices of {other.stock!r} and {link.peer!r} are both of link {link.name!r}")
        row = await self.db(lambda store: store.bind_link(link))
        self.links[link.peer].row = row
        return row

    async def set_alarms(self, peer: str, alarms: dict[str, str]) -> None:
        """Replaces all alarms of the link, here and on the disk."""
        link = self.links[peer]
        if link.alarms == alarms:
            return
        link.alarms = alarms
        alarm = link.alarm
        log.warning("alarm" if alarm else "alarm cleared", peer=peer, alarm=alarm)
        await self.db(lambda store: store.set_alarm(peer, alarm))
