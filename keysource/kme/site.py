"""What one KME knows and does: its store, the state of its links, and how a key is issued, reserved and fetched.

No HTTP here.  The store works in a thread of its own, one call at a time; everything else belongs to the event loop.

**Issuing.**  A key leaves this KME only after the other KME has it on its disk as reserved for the same pair.  Until
then it stays in the store; where the other KME gave no answer, the offer is remembered (with its token) and made
again for the same pair, so that an outage costs no key.  After a crash the memory of it is gone: the other KME then
says that the key is taken, and it is dropped.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog

from keysource.base import Owner
from keysource.kme.config import KmeConfig, PeerKme
from keysource.kme.logs import hashed
from keysource.kme.peering import PeerClient, PeerUnavailable
from keysource.kme.store import Counts, KeysNotFound, LinkRow, Offer, Reservation, Store, StoredKey

_T = TypeVar("_T")
_ROUNDS = 8
_MOST_PENDING = 4096
ISSUE_TIMEOUT = 1.6
EXHAUSTED = "exhausted"  # only for lack of keys
NOT_OWNER = "not-owner"  # all keys of the link are issued at its other end
log = structlog.get_logger("kme")


class NotNow(Exception):
    """No key now.  One sentence, and for programs a ``reason``: :data:`EXHAUSTED`, :data:`NOT_OWNER` or nothing."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class LinkState:
    """What is known of a link and its device now."""

    peer: PeerKme
    row: LinkRow | None = None
    """None before the device has ever said hello."""
    connected: bool = False
    trouble: str = "the device was not reached yet"
    alarms: dict[str, str] = field(default_factory=dict)
    qber: float | None = None
    key_rate: float | None = None

    @property
    def alarm(self) -> str:
        """Empty where there is none."""
        return "; ".join(f"{kind}: {detail}" if detail else kind for kind, detail in self.alarms.items())


@dataclass(slots=True)
class _Pending:
    """An own key that was offered and not yet issued."""

    offer: Offer
    master: str
    slave: str
    under_way: bool = True


class Site:
    """See the module."""

    def __init__(self, config: KmeConfig, peers: dict[str, PeerClient]) -> None:
        self.config = config
        self.links = {peer.id: LinkState(peer) for peer in config.peer_kme}
        self._peers = peers
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1, "store")
        self._pending: dict[str, _Pending] = {}
        self._choosing = asyncio.Lock()

    async def open(self) -> None:
        """Raises :class:`~keysource.kme.store.StoreError`."""
        config = self.config
        self._store = await self._run(
            lambda: Store(config.path(config.kme.store), config.kme.id, max_keys=config.limits.max_key_count)
        )
        for peer, state in self.links.items():
            state.row = await self._run(partial(self._store.link, peer))
            if state.row and state.row.alarm:
                state.alarms = {"last known": state.row.alarm}

    async def aclose(self) -> None:
        """Close store and connections to the other KMEs."""
        for peer in self._peers.values():
            await peer.aclose()
        store, self._store = self._store, None
        if store is not None:
            await self._run(store.close)
        self._thread.shutdown(wait=True)

    async def db(self, work: Callable[[Store], _T]) -> _T:
        """Do something with the store.  Cancelling the caller does not stop it half-way."""
        store = self._store
        if store is None:
            raise NotNow("the KME is stopping")
        return await self._run(lambda: work(store))

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def counts(self, peer: str) -> Counts:
        return await self.db(lambda store: store.counts(peer))

    async def expire(self) -> None:
        """Forget reservations whose slave never came."""
        limit = time.time() - self.config.limits.reserved_for
        if gone := await self.db(lambda store: store.expire(limit)):
            log.warning("reserved keys expired, their slave SAE never fetched them", count=gone)

    # Master's side

    async def issue(self, peer: str, master: str, slave: str, number: int) -> list[StoredKey]:
        """``number`` own keys, reserved at the other KME, deleted here.

        Raises:
            NotNow: too few keys, an alarm, or the other KME is not there.
        """
        link = self.links[peer]
        if link.alarm:
            raise NotNow(f"the link to {peer!r} has an alarm ({link.alarm})")
        if link.row and link.row.owner is not Owner.ALTERNATE and Owner(link.row.end) is not link.row.owner:
            raise NotNow(f"all keys of the link to {peer!r} are issued there", reason=NOT_OWNER)
        if link.row is None or (await self.counts(peer)).own_free < number:
            raise NotNow(f"fewer than {number} keys are left for {slave!r}", reason=EXHAUSTED)
        try:
            async with asyncio.timeout(ISSUE_TIMEOUT):
                return await self._issue(link, link.row.name, master, slave, number)
        except TimeoutError:
            raise NotNow(f"KME {peer!r} takes too long") from None

    async def _issue(self, link: LinkState, name: str, master: str, slave: str, number: int) -> list[StoredKey]:
        peer = link.peer.id
        reserved: list[str] = []
        mine: list[str] = []
        try:
            for _ in range(_ROUNDS):
                offers = await self._choose(peer, master, slave, number - len(reserved), mine)
                answer = await self._offer(peer, name, master, slave, offers)
                missing = set(answer.missing)
                reserved += [offer.key_id for offer in offers if offer.key_id not in missing]
                await self._drop_missing(peer, [offer for offer in offers if offer.key_id in missing], answer)
                if len(reserved) == number:
                    return await self._hand_out(peer, reserved)
            raise NotNow(f"too many keys are not held by KME {peer!r}", reason=EXHAUSTED)
        except KeysNotFound:  # a void or a full store took one away between offer and answer
            self._forget(reserved)
            raise NotNow("keys were voided while they were offered") from None
        finally:
            self._release(mine)

    async def _hand_out(self, peer: str, reserved: list[str]) -> list[StoredKey]:
        keys = await self.db(lambda store: store.issue(peer, reserved))
        self._forget(reserved)
        return keys

    async def _choose(self, peer: str, master: str, slave: str, number: int, mine: list[str]) -> list[Offer]:
        """Offers for ``number`` more keys, noted in ``mine``: what was offered to this pair before and got no answer
        may be offered again, what another call or pair has is left alone."""
        async with self._choosing:
            free = await self.db(lambda store: store.free_own(peer, number + len(self._pending)))
            chosen: list[_Pending] = []
            for key_id, block in free:
                known = self._pending.get(key_id)
                if known is None:
                    chosen.append(_Pending(Offer(key_id, block, secrets.token_urlsafe(18)), master, slave))
                elif not known.under_way and (known.master, known.slave) == (master, slave):
                    chosen.append(known)
            if len(chosen) < number:
                raise NotNow(f"fewer than {number} keys are left for {slave!r}", reason=EXHAUSTED)
            for pending in chosen[:number]:
                pending.under_way = True
                self._pending[pending.offer.key_id] = pending
                mine.append(pending.offer.key_id)
            return [pending.offer for pending in chosen[:number]]

    async def _offer(self, peer: str, name: str, master: str, slave: str, offers: list[Offer]) -> Reservation:
        try:
            return await self._peers[peer].reserve(name, master, slave, offers)
        except PeerUnavailable as error:
            log.warning("nothing is issued", reason=str(error), keys=[hashed(offer.key_id) for offer in offers[:8]])
            raise NotNow(str(error)) from None

    def _release(self, key_ids: Sequence[str]) -> None:
        """This call is over: what it offered in vain may be offered again to the same pair."""
        for key_id in key_ids:
            if pending := self._pending.get(key_id):
                pending.under_way = False
        if len(self._pending) > _MOST_PENDING:  # the other KME will say that these are taken, and they are dropped
            self._pending = {key_id: pending for key_id, pending in self._pending.items() if pending.under_way}

    async def _drop_missing(self, peer: str, missing: list[Offer], answer: Reservation) -> None:
        """Keys that the other KME will never have are deleted; keys that it may still get wait."""
        gone = [offer.key_id for offer in missing if offer.block < answer.next_block]
        if missing:
            keep = set(self._pending)
            dropped = await self.db(lambda store: store.drop_own(peer, gone, below=answer.first_block, keep=keep))
            log.warning("the other KME does not hold all keys", peer=peer, dropped=dropped)
        self._forget([offer.key_id for offer in missing])
        if len(gone) < len(missing):
            raise NotNow(f"KME {peer!r} has not received these keys from its device yet", reason=EXHAUSTED)

    def _forget(self, key_ids: Sequence[str]) -> None:
        for key_id in key_ids:
            self._pending.pop(key_id, None)

    # Slave's side

    async def reserve(self, peer: str, master: str, slave: str, offers: list[Offer]) -> Reservation:
        """The other KME is about to issue these keys.  ``NotNow`` while our device reports an alarm."""
        link = self.links[peer]
        if link.alarm:
            raise NotNow(f"the link to {peer!r} has an alarm ({link.alarm})")
        if link.row is None:
            return Reservation([offer.key_id for offer in offers], 0, 0)
        now = time.time()
        return await self.db(lambda store: store.reserve(peer, master, slave, offers, now))

    async def fetch(self, master: str, slave: str, key_ids: list[str]) -> list[StoredKey]:
        """Raises :class:`NotTheSlave` or :class:`KeysNotFound`; then nothing is gone."""
        return await self.db(lambda store: store.fetch(master, slave, key_ids))

    # What the device says

    async def bind(self, link: LinkRow) -> LinkRow:
        """Raises :class:`~keysource.kme.store.StoreError` where the device is another end or another link."""
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
