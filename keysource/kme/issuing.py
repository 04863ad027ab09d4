"""The master's side of one KME: how a key is offered to the other KME, and issued.

A key leaves this KME only after the other KME has it on its disk as reserved for the same pair.  Until then it stays
in the store; where the other KME gave no answer, the offer is remembered (with its token) and made again for the same
pair, so that an outage costs no key.  After a crash the memory of it is gone: the other KME then says that the key is
taken, and it is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from keysource.base import Owner, wipe
from keysource.kme import crashpoints
from keysource.kme.config import KmeConfig
from keysource.kme.ground import EXHAUSTED, NOT_OWNER, Ground, NotNow
from keysource.kme.keystore import KeyStore
from keysource.kme.links import links_to, shared_out
from keysource.kme.logs import hashed
from keysource.kme.peering import PeerClient, PeerUnavailable
from keysource.kme.records import ANY, KeysNotFound, Offer, Reservation, StoredKey, Terms, Unit, Wanted

ROUNDS = 8
_MOST_PENDING = 4096
ISSUE_TIMEOUT = 1.6
AT_ONCE, QUEUE_TIMEOUT = 16, 0.8
"""Exchanges with other KMEs that may be under way, and seconds that one more waits for its turn.  Without this bound
a crowd slows all of its exchanges down until none ends in time, and all of their work is done again and again."""
Taken = tuple[Unit, StoredKey]
Refused = dict[str, NotNow]
"""Stock -> why there is no key of it now."""
log = structlog.get_logger("kme")


@dataclass(slots=True)
class _Pending:
    """An own key that was offered and not yet issued."""

    offer: Offer
    terms: Terms
    under_way: bool = True


def _free_own(store: KeyStore, peer: str, limit: int, wanted: Wanted) -> list[Unit]:
    return store.free_own(peer, limit, wanted)


def _too_few(terms: Terms) -> NotNow:
    return NotNow(f"too few keys are left for {', '.join(map(repr, terms.slaves))}", reason=EXHAUSTED)


class Issuing(Ground):
    """See the module."""

    def __init__(self, config: KmeConfig, peers: dict[str, PeerClient]) -> None:
        super().__init__(config, peers)
        self._pending: dict[str, _Pending] = {}
        self._busy: set[str] = set()
        """Units that make up the pending keys."""
        self.choosing = asyncio.Lock()
        self._turns = asyncio.Semaphore(AT_ONCE)

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
                self.well(stock)  # an alarm may have come while they were offered
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
