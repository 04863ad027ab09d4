"""What one KME knows and does: its store, the state of its links, and how a key is issued, reserved and fetched.

No HTTP here.  The store works in threads of its own (one, or as many as there are connections to a database), each
call in one of them; everything else belongs to the event loop.

**Issuing.**  A key leaves this KME only after the other KME has it on its disk as reserved for the same pair.  Until
then it stays in the store; where the other KME gave no answer, the offer is remembered (with its token) and made
again for the same pair, so that an outage costs no key.  After a crash the memory of it is gone: the other KME then
says that the key is taken, and it is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import structlog

from keysource.base import Owner, wipe
from keysource.kme import crashpoints
from keysource.kme.boundedlog import BoundedLog
from keysource.kme.config import KmeConfig
from keysource.kme.keystore import KeyStore
from keysource.kme.links import LinkState, link_named, links_of, links_to, shared_out
from keysource.kme.logs import hashed
from keysource.kme.peering import PeerClient, PeerUnavailable
from keysource.kme.records import (
    ANY,
    Alarmed,
    Counts,
    Deposit,
    KeysNotFound,
    LinkRow,
    Offer,
    Reservation,
    StoredKey,
    StoreError,
    Terms,
    Unit,
    Wanted,
)
from keysource.kme.stores import is_shared, open_stores, workers

_T = TypeVar("_T")
ROUNDS = 8
_MOST_PENDING = 4096
MANY, COUNT_AGAIN = 4096, 0.5
"""Keys of a large stock, and seconds for which its count is good enough for an SAE's status."""
ISSUE_TIMEOUT = 1.6
AT_ONCE, QUEUE_TIMEOUT = 16, 0.8
"""Exchanges with other KMEs that may be under way, and seconds that one more waits for its turn.  Without this bound
a crowd slows all of its exchanges down until none ends in time, and all of their work is done again and again."""
Taken = tuple[Unit, StoredKey]
Refused = dict[str, "NotNow"]
"""Stock -> why there is no key of it now."""
EXHAUSTED = "exhausted"  # only for lack of keys
NOT_OWNER = "not-owner"  # all keys of the link are issued at its other end
log = structlog.get_logger("kme")


class NotNow(Exception):
    """No key now.  One sentence, and for programs a ``reason``: :data:`EXHAUSTED`, :data:`NOT_OWNER` or nothing."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class _Pending:
    """An own key that was offered and not yet issued."""

    offer: Offer
    terms: Terms
    under_way: bool = True


def _free_own(store: KeyStore, peer: str, limit: int, wanted: Wanted) -> list[Unit]:
    return store.free_own(peer, limit, wanted)


def _link(store: KeyStore, peer: str) -> LinkRow | None:
    return store.link(peer)


def _withdraw(store: KeyStore, stock: str, tokens: list[str]) -> int:
    return store.withdraw(stock, tokens)


def _too_few(terms: Terms) -> NotNow:
    return NotNow(f"too few keys are left for {', '.join(map(repr, terms.slaves))}", reason=EXHAUSTED)


class Site:
    """See the module."""

    def __init__(self, config: KmeConfig, peers: dict[str, PeerClient]) -> None:
        self.config = config
        self.links = links_of(config)
        self.peers = peers
        self.told = BoundedLog()
        """For what callers can cause at will."""
        self._store: KeyStore | None = None
        """The first of the open ones; which of them serves a call is the threads' matter."""
        self._stores: list[KeyStore] = []
        self._idle: SimpleQueue[KeyStore] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers(config), "store")
        self._pending: dict[str, _Pending] = {}
        self._busy: set[str] = set()
        """Units that make up the pending keys."""
        self.choosing = asyncio.Lock()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._counted: dict[str, tuple[float, Counts]] = {}

    async def open(self) -> None:
        """Raises :class:`~keysource.kme.store.StoreError`."""
        self._stores = await self._run(partial(open_stores, self.config))
        self._store = self._stores[0]
        for store in self._stores:
            self._idle.put(store)
        if not self.config.store.require_standby:
            log.warning("no synchronous standby is required: a failover of the database may give a key out twice")
        if self._store.migrated:
            log.info("the store of an older release was brought up to date; its keys are wrapped now")
        for peer, state in self.links.items():
            state.row = await self.db(partial(_link, peer=peer))
            if state.row and state.row.alarm:
                state.alarms = {"last known": state.row.alarm}

    async def follow_links(self) -> None:
        """What other processes at the same store have heard of the devices that they have."""
        for link in self.config.link:
            state = self.links[link.stock]
            row = await self.db(partial(_link, peer=link.stock))
            if link.device is None:
                state.trouble = "another process of the site has the device"
                state.alarms = {"last known": row.alarm} if row and row.alarm else {}
            state.row = row or state.row

    @property
    def shared(self) -> bool:
        """Are other processes at the same store?"""
        return is_shared(self.config)

    async def aclose(self) -> None:
        """Close store and connections to the other KMEs."""
        for peer in self.peers.values():
            await peer.aclose()
        self._store = None
        for store in self._stores:
            await self._run(store.close)
        self._threads.shutdown(wait=True)

    async def db(self, work: Callable[[KeyStore], _T]) -> _T:
        """Do something with the store.  Cancelling the caller does not stop it half-way."""
        if self._store is None:
            raise NotNow("the KME is stopping")
        return await self._run(partial(self._with_a_store, work))

    def _with_a_store(self, work: Callable[[KeyStore], _T]) -> _T:
        store = self._idle.get()  # there are as many as threads
        try:
            return work(store)
        except Alarmed as error:
            raise NotNow(str(error)) from None
        finally:
            self._idle.put(store)

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

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

    # Master's side

    async def issue(self, peer: str, terms: Terms, number: int, wanted: Wanted = ANY) -> list[StoredKey]:
        """``number`` keys made of own units, reserved at the other KME, deleted here: of the link that has most, and
        what that has not of the others.

        Raises:
            NotNow: too few keys, an alarm, or the other KME is not there.
        """
        self._usable_stocks(peer, terms, {})
        mine: list[Offer] = []
        try:
            async with self.turn():
                reserved = await self._reserved_somewhere(peer, terms, number, wanted, mine)
            # No deadline from here on: the store would go on without us, and what it deletes would be nobody's.
            for stock in reserved:
                self._well(stock)  # an alarm may have come while they were offered
            return await self._hand_all_out(reserved, terms.size)
        except TimeoutError:
            raise NotNow(f"KME {peer!r} takes too long") from None
        finally:
            self._release(mine)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One of the exchanges that may be under way.  All of it, with the wait, has :data:`ISSUE_TIMEOUT` seconds.

        Raises:
            NotNow: too many are before it; it has touched nothing.
            TimeoutError: it took too long.
        """
        async with asyncio.timeout(ISSUE_TIMEOUT):
            try:
                async with asyncio.timeout(QUEUE_TIMEOUT):
                    await self._turns.acquire()
            except TimeoutError:
                raise NotNow("too many ask for keys at once") from None
            try:
                yield
            finally:
                self._turns.release()

    def usable(self, stock: str, terms: Terms) -> str:
        """The name of a link over which own units of that stock may be issued now.  Raises :class:`NotNow`."""
        link = self.links[stock]
        if link.alarm:
            raise NotNow(f"the link to {stock!r} has an alarm ({link.alarm})")
        if link.row and link.row.owner is not Owner.ALTERNATE and Owner(link.row.end) is not link.row.owner:
            raise NotNow(f"all keys of the link to {stock!r} are issued there", reason=NOT_OWNER)
        if link.row is None:
            raise _too_few(terms)
        return link.row.name

    async def richest(self, peer: str, terms: Terms, units: int, wanted: Wanted) -> str:
        """The stock of the link there with most units free, counted up to ``units``.  Raises :class:`NotNow`."""
        stocks = self._usable_stocks(peer, terms, {})
        if len(stocks) == 1:
            return stocks[0]
        free = {stock: await self._free_units(stock, units, terms, wanted) for stock in stocks}
        return max(stocks, key=lambda stock: free[stock])

    async def _reserved_somewhere(
        self, peer: str, terms: Terms, number: int, wanted: Wanted, mine: list[Offer]
    ) -> dict[str, list[Offer]]:
        """Offers by stock.  A link over which the other KME gives none, for an alarm of its own say, is left out."""
        refused: Refused = {}
        while True:
            reserved: dict[str, list[Offer]] = {}
            for stock, part in (await self._shared_out(peer, terms, number, wanted, refused)).items():
                try:
                    link = self.usable(stock, terms)
                    reserved[stock] = await self._have_reserved(stock, link, terms, part, wanted, mine)
                except NotNow as error:
                    refused[stock] = error
                    self._release(mine)  # what was reserved of other links is offered again
                    mine.clear()
                    break
            else:
                return reserved

    async def _shared_out(
        self, peer: str, terms: Terms, number: int, wanted: Wanted, refused: Refused
    ) -> dict[str, int]:
        """Of which stock how many keys.  Raises :class:`NotNow`."""
        stocks = self._usable_stocks(peer, terms, refused)
        if len(stocks) == 1:
            return {stocks[0]: number}
        needed = number * terms.units
        free = {s: await self._free_units(s, needed, terms, wanted) // terms.units for s in stocks}
        if not (parts := shared_out(free, number)):
            raise next(iter(refused.values()), _too_few(terms))
        return parts

    def _usable_stocks(self, peer: str, terms: Terms, refused: Refused) -> list[str]:
        """Of the links to that KME; where none is usable, what stops the first.  Raises :class:`NotNow`."""
        found, refusals = list[str](), list(refused.values())
        for link in links_to(self.links, peer):
            if link.stock in refused:
                continue
            try:
                self.usable(link.stock, terms)
                found.append(link.stock)
            except NotNow as error:
                refusals.append(error)
        if not found:
            raise refusals[0]
        return found

    async def _free_units(self, stock: str, units: int, terms: Terms, wanted: Wanted) -> int:
        """That :meth:`_choose` could take now, about up to ``units``."""
        again = [p.offer for p in self._pending.values() if not p.under_way and p.terms == terms]
        busy = self._busy - {unit.key_id for offer in again for unit in offer.units}
        found = await self.db(lambda store: store.free_own(stock, units + len(busy), wanted))
        return sum(unit.key_id not in busy for unit in found)

    async def _have_reserved(
        self, stock: str, link: str, terms: Terms, number: int, wanted: Wanted, mine: list[Offer]
    ) -> list[Offer]:
        reserved: list[Offer] = []
        for _ in range(ROUNDS):
            offers = await self._choose(stock, terms, number - len(reserved), wanted, mine)
            crashpoints.at("enc.chosen")
            answer = await self._offer(self.links[stock].peer, link, terms, offers)
            missing = set(answer.missing)
            lacking = [offer for offer in offers if missing & {unit.key_id for unit in offer.units}]
            reserved += [offer for offer in offers if offer not in lacking]
            self._forget(lacking)
            await self.drop_missing(stock, [unit for offer in lacking for unit in offer.units], answer)
            if len(reserved) == number:
                return reserved
        raise NotNow(f"too many keys are not held by KME {self.links[stock].peer!r}", reason=EXHAUSTED)

    async def _hand_all_out(self, reserved: dict[str, list[Offer]], size: int) -> list[StoredKey]:
        keys: list[StoredKey] = []
        try:
            for stock, offers in reserved.items():
                keys += await self._hand_out(stock, offers, size)
        except BaseException:  # all or nothing: those are gone
            for key in keys:
                wipe(key.material)
            raise
        return keys

    async def _hand_out(self, stock: str, reserved: list[Offer], size: int) -> list[StoredKey]:
        crashpoints.at("enc.reserved")
        units = [[unit.key_id for unit in offer.units] for offer in reserved]
        try:
            return await self.db(lambda store: store.issue(stock, units, size))
        except KeysNotFound:  # a void or a full store took one away between offer and answer
            raise NotNow("keys were voided while they were offered") from None
        finally:
            self._forget(reserved)

    async def _choose(self, stock: str, terms: Terms, number: int, wanted: Wanted, mine: list[Offer]) -> list[Offer]:
        """Offers for ``number`` more keys, noted in ``mine``: what was offered on these terms before and got no
        answer may be offered again; what another call has, or was offered on other terms, is left alone."""
        async with self.choosing:
            limit = number * terms.units + len(self._busy)
            free = await self.db(lambda store: store.free_own(stock, limit, wanted))
            listed = {unit.key_id for unit in free}
            chosen: list[_Pending] = []
            fresh: list[Unit] = []
            for unit in free:
                known = self._pending.get(unit.key_id)
                if known and not known.under_way and known.terms == terms:
                    if listed.issuperset(part.key_id for part in known.offer.units):
                        chosen.append(known)
                elif unit.key_id not in self._busy:
                    fresh.append(unit)
                if len(fresh) == terms.units:
                    (first, *more), fresh = fresh, []
                    offer = Offer(first.key_id, first.block, secrets.token_urlsafe(18), tuple(more))
                    chosen.append(_Pending(offer, terms))
            if len(chosen) < number:
                raise _too_few(terms)
            for pending in chosen[:number]:
                self._note(pending)
                mine.append(pending.offer)
            return [pending.offer for pending in chosen[:number]]

    async def take(self, wanted: Wanted, terms: Terms, counts: dict[str, int]) -> dict[str, list[Taken]]:
        """Delete that many own units of each link and return them: whatever happens next, they are spent.

        Raises:
            NotNow: one link has too few.
        """
        async with self.choosing:
            chosen: list[tuple[str, list[Unit]]] = []
            for peer, count in counts.items():
                limit = count + len(self._busy)
                found = await self.db(partial(_free_own, peer=peer, limit=limit, wanted=wanted))
                free = [unit for unit in found if unit.key_id not in self._busy][:count]
                if len(free) < count:
                    raise _too_few(terms)
                chosen.append((peer, free))
            names = [(peer, [unit.key_id for unit in units]) for peer, units in chosen]
            taken = await self.db(lambda store: store.take(names))
        return {peer: list(zip(units, keys, strict=True)) for (peer, units), keys in zip(chosen, taken, strict=True)}

    async def _offer(self, peer: str, link: str, terms: Terms, offers: list[Offer]) -> Reservation:
        try:
            return await self.peers[peer].reserve(link, terms, offers)
        except PeerUnavailable as error:
            hashes = [hashed(offer.key_id) for offer in offers[:8]]
            self.told.warning("nothing is issued", peer, time.monotonic(), reason=str(error), keys=hashes)
            raise NotNow(str(error)) from None

    async def drop_missing(self, stock: str, units: Sequence[Unit], answer: Reservation) -> None:
        """Units that the other KME will never have are deleted; those that it may still get wait.

        Raises:
            NotNow: there are such.
        """
        missing = [unit for unit in units if unit.key_id in set(answer.missing)]
        gone = [unit.key_id for unit in missing if unit.block < answer.next_block]
        if missing:
            keep = set(self._busy)
            dropped = await self.db(lambda store: store.drop_own(stock, gone, below=answer.first_block, keep=keep))
            log.warning("the other KME does not hold all keys", peer=stock, dropped=dropped)
        if len(gone) < len(missing):
            peer = self.links[stock].peer
            raise NotNow(f"KME {peer!r} has not received these keys from its device yet", reason=EXHAUSTED)

    def _note(self, pending: _Pending) -> None:
        pending.under_way = True
        self._pending[pending.offer.key_id] = pending
        self._busy.update(unit.key_id for unit in pending.offer.units)

    def _release(self, offers: Sequence[Offer]) -> None:
        """This call is over: what it offered in vain may be offered again on the same terms."""
        for offer in offers:
            if pending := self._pending.get(offer.key_id):
                pending.under_way = False
        if len(self._pending) > _MOST_PENDING:  # the other KME will say that these are taken, and they are dropped
            self._forget([pending.offer for pending in self._pending.values() if not pending.under_way])

    def _forget(self, offers: Sequence[Offer]) -> None:
        for offer in offers:
            self._pending.pop(offer.key_id, None)
            self._busy.difference_update(unit.key_id for unit in offer.units)

    # Slave's side

    async def reserve(self, stock: str, terms: Terms, offers: list[Offer]) -> Reservation:
        """The other KME is about to issue these keys.  ``NotNow`` while our device reports an alarm."""
        if self._well(stock).row is None:
            return Reservation([unit.key_id for offer in offers for unit in offer.units], 0, 0)
        now = time.time()
        return await self.db(lambda store: store.reserve(stock, terms, offers, now))

    async def deposit(self, stock: str, terms: Terms, deposits: list[Deposit]) -> Reservation:
        """The same for keys of another link.  Raises :class:`NotNow`, :class:`~keysource.kme.records.BadDeposit`."""
        self._well(stock)
        now = time.time()
        return await self.db(lambda store: store.deposit(stock, terms, deposits, now))

    async def withdrawn(self, peer: str, tokens: list[str]) -> int:
        """The other KME will not issue these.  Returns how many are gone."""
        gone = 0
        for link in links_to(self.links, peer):
            gone += await self.db(partial(_withdraw, stock=link.stock, tokens=tokens))
        return gone

    def links_to(self, peer: str) -> list[LinkState]:
        """All links to one KME."""
        return links_to(self.links, peer)

    def link_meant(self, peer: str, name: str) -> LinkState | None:
        """By the name that the devices say; None where it is another one."""
        return link_named(self.links, peer, name)

    async def fetch(self, master: str, slave: str, key_ids: list[str]) -> list[StoredKey]:
        """Raises :class:`NotTheSlave` or :class:`KeysNotFound`; then nothing is gone."""
        # Asked now, not when the key was reserved: a day may lie between, and the configuration may be another.
        sae = self.config.local_sae(slave)
        may = sae is not None and master in sae.may_share_with
        return await self.db(lambda store: store.fetch(master, slave, key_ids, may=may))

    def _well(self, stock: str) -> LinkState:
        link = self.links[stock]
        if link.alarm:
            raise NotNow(f"the link to {stock!r} has an alarm ({link.alarm})")
        return link

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
