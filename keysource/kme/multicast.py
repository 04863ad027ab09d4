"""One key for slaves at several KMEs: ``additional_slave_SAE_IDs`` where they are not all served at one place.

The key is made of units of the link to the first slave's KME, which reserves it as always.  To every other KME it
goes over the link there, under a one-time pad and a one-time MAC of that link (a *deposit*), so that no key that was
not made by a quantum link protects it anywhere.

All or nothing: the units are deleted here before any other KME hears of them, so that none is ever used twice; the
master gets the key when every KME has it on its disk; if one has not, the others are asked to forget it, and where
they cannot be asked, the key waits there for slaves that never learn its key_ID, until its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keysource.base import wipe
from keysource.kme import crashpoints
from keysource.kme.ground import EXHAUSTED, NotNow
from keysource.kme.issuing import ROUNDS, Taken
from keysource.kme.peering import PeerUnavailable
from keysource.kme.records import (
    Deposit,
    KeysNotFound,
    Offer,
    Reservation,
    StoredKey,
    Terms,
    Unit,
    Wanted,
    deposit_tag,
    weakest,
    xor,
)
from keysource.kme.site import Site

_background: set[asyncio.Task[None]] = set()
Shares = dict[str, Terms]
"""Peer KME -> what its slaves get; the first peer's link makes the key.  ``slaves`` differ, the rest is alike."""
Ways = dict[str, tuple[str, str]]
"""Peer KME -> stock and name of the link that goes there."""


@dataclass(slots=True)
class _Round:
    """One attempt: keys that nobody has yet, and what each KME was told."""

    keys: list[StoredKey]
    shares: Shares
    ways: Ways
    tokens: dict[str, list[str]]
    offers: list[Offer]
    deposits: dict[str, list[Deposit]] = field(default_factory=dict)

    def units(self, peer: str) -> list[Unit]:
        """What of a link went into this round."""
        made: Sequence[Offer | Deposit] = self.deposits.get(peer, self.offers)
        return [unit for one in made for unit in one.units]


def units_of_a_key(shares: Shares) -> int:
    """What one key costs, over all links: for every KME but the first a pad and the key of a MAC."""
    return sum(terms.units for terms in shares.values()) + len(shares) - 1


async def issue(site: Site, shares: Shares, number: int, wanted: Wanted) -> list[StoredKey]:
    """``number`` keys, each on the disks of all these KMEs.

    Raises:
        NotNow: too few units of some link, or a KME did not take its share; then nobody has a key.
    """
    first, *others = shares
    units = shares[first].units
    counts = {peer: number * (units if peer == first else units + 1) for peer in (first, *others)}
    stocks = {peer: await site.richest(peer, terms, counts[peer], wanted) for peer, terms in shares.items()}
    ways = {peer: (stock, site.usable(stock, shares[peer])) for peer, stock in stocks.items()}
    try:
        async with site.turn():
            keys = await _some_round(site, shares, ways, number, wanted, counts)
    except TimeoutError:
        raise NotNow("a KME of these slaves takes too long") from None
    except KeysNotFound:
        raise NotNow("keys were voided while they were taken") from None
    try:
        for peer, terms in shares.items():
            site.usable(stocks[peer], terms)  # an alarm may have come while they were offered
        await site.db(lambda store: store.count_issued(stocks[first], number))
    except BaseException:
        for key in keys:
            wipe(key.material)
        raise
    crashpoints.at("enc.committed")
    return keys


async def _some_round(
    site: Site, shares: Shares, ways: Ways, number: int, wanted: Wanted, counts: dict[str, int]
) -> list[StoredKey]:
    for _ in range(ROUNDS):
        round_ = await _prepare(site, shares, ways, number, wanted, counts)
        if await _all_reserve(site, round_):
            return round_.keys
    raise NotNow("too many keys are not held by the other KMEs", reason=EXHAUSTED)


async def _prepare(
    site: Site, shares: Shares, ways: Ways, number: int, wanted: Wanted, counts: dict[str, int]
) -> _Round:
    first = next(iter(shares))
    by_stock = await site.take(wanted, shares[first], {ways[peer][0]: count for peer, count in counts.items()})
    taken = {peer: by_stock[stock] for peer, (stock, _link) in ways.items()}
    parts = [key for units in taken.values() for _unit, key in units]
    origin, hops = weakest(key.origin for key in parts), max(key.hops for key in parts)
    shares = {peer: replace(terms, origin=origin, hops=hops) for peer, terms in shares.items()}
    per_key, size = shares[first].units, shares[first].size
    offers, keys = [], []
    tokens = {peer: [secrets.token_urlsafe(18) for _ in range(number)] for peer in shares}
    for index in range(number):
        units = taken[first][index * per_key : (index + 1) * per_key]
        (name, block), *more = (unit for unit, _key in units)
        offers.append(Offer(name, block, tokens[first][index], tuple(more)))
        material = _joined([key for _unit, key in units], size)
        keys.append(StoredKey(name, material, origin, hops))
    round_ = _Round(keys, shares, ways, tokens, offers)
    for peer in list(shares)[1:]:
        round_.deposits[peer] = [
            _deposit(ways[peer][1], shares[peer], key, tokens[peer][index], taken[peer][index :: len(keys)])
            for index, key in enumerate(keys)
        ]
    return round_


def _joined(units: list[StoredKey], size: int) -> bytearray:
    material = bytearray().join(unit.material for unit in units)[: size // 8]
    for unit in units:
        wipe(unit.material)
    return material


def _deposit(link: str, terms: Terms, key: StoredKey, token: str, units: list[Taken]) -> Deposit:
    *pad, (mac, mac_key) = units
    mask = _joined([part for _unit, part in pad], terms.size)
    names = tuple(unit for unit, _part in pad)
    deposit = Deposit(key.key_id, token, names, mac, bytes(xor(key.material, mask)), b"")
    tag = deposit_tag(mac_key.material, link, terms, deposit)
    wipe(mask)
    wipe(mac_key.material)
    return replace(deposit, tag=tag)


async def _all_reserve(site: Site, round_: _Round) -> bool:
    """True: every KME has its share.  False: some lacked a unit, and nobody has a key.

    Raises:
        NotNow: a KME did not answer or refused; nobody has a key.
    """
    first = next(iter(round_.shares))
    calls: dict[str, Coroutine[Any, Any, Reservation]] = {
        first: site.peers[first].reserve(round_.ways[first][1], round_.shares[first], round_.offers)
    }
    for peer, deposits in round_.deposits.items():
        calls[peer] = site.peers[peer].deposit(round_.ways[peer][1], round_.shares[peer], deposits)
    complete = False
    try:
        answers = await asyncio.gather(*(_counted(call) for call in calls.values()), return_exceptions=True)
        lacking = 0
        for peer, answer in zip(calls, answers, strict=True):
            if isinstance(answer, PeerUnavailable):
                site.told.warning("nothing is issued", peer, time.monotonic(), peer=peer, reason=str(answer))
                raise NotNow(str(answer))
            if isinstance(answer, BaseException):
                raise answer
            lacking += bool(answer.missing)
            await site.drop_missing(round_.ways[peer][0], round_.units(peer), answer)
        complete = not lacking
        crashpoints.at("multicast.reserved")
        return complete
    finally:
        if not complete:
            _give_up(site, round_)


async def _counted(call: Coroutine[Any, Any, Reservation]) -> Reservation:
    answer = await call
    crashpoints.at("multicast.partly-reserved")
    return answer


def _give_up(site: Site, round_: _Round) -> None:
    """Wipe the keys, and ask every KME to forget them; the caller does not wait for that."""
    for key in round_.keys:
        wipe(key.material)

    async def withdraw(peer: str) -> None:
        with contextlib.suppress(PeerUnavailable):
            await site.peers[peer].withdraw(round_.tokens[peer])

    for peer in round_.shares:
        task = asyncio.create_task(withdraw(peer))
        _background.add(task)
        task.add_done_callback(_background.discard)
