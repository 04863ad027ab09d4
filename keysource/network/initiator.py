"""The end that begins: it chooses ways, makes the shares, and asks for the last word until it has it.

::

    idle ── Open ▶ opening ── Ready ▶ relaying ── Proof, on the disk ▶ committing ── Verdict ▶ idle

Up to *relaying* a crash or a failure costs only pads.  From *committing* on the target may have the block, so this
end keeps it and asks again, for ever and over restarts, and begins nothing else.
"""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from keysource.network import onetime, routes, shares
from keysource.network.core import GIVE_UP, RESEND, Core
from keysource.network.errors import NoRoute, NotAuthentic
from keysource.network.messages import Ack, Commit, Header, Message, Open, Proof, Ready, Verdict, Void
from keysource.network.relay import Relays
from keysource.network.rows import Block, Facts
from keysource.network.stocks import SHUN_ALTERED, SHUN_LATE, SHUN_LINK, Stocks
from keysource.network.topology import Connection, hops_over

_PAUSE, _LONGEST_PAUSE, _LONGEST_RESEND = 0.25, 5.0, 5.0
_RATE_SPAN = 30.0


@dataclass(slots=True)
class _Sending:
    """A block under way."""

    terms: shares.Terms
    until: float
    ek: bytes = b""
    kem: bytes = b""
    secret: shares.Secret | None = field(default=None, repr=False)


class Initiator:
    """One connection whose first end is here.  ``room`` gives how many keys may be delivered now."""

    def __init__(
        self, core: Core, connection: Connection, relays: Relays, stocks: Stocks, room: Callable[[], int]
    ) -> None:
        self._core, self.connection = core, connection
        self._relays, self._stocks, self._room = relays, stocks, room
        self._target = connection.ends[1]
        self._sending: _Sending | None = None
        self._prepared = core.store.prepared(connection.name)
        self._next_start = self._next_send = float("-inf")
        self._wait, self._resend = _PAUSE, RESEND
        self._done: deque[tuple[float, int]] = deque()
        self._paths: tuple[tuple[str, ...], ...] = ()
        self.trouble = ""
        """Why nothing is relayed, one sentence."""

    @property
    def state(self) -> str:
        if self._prepared:
            return "committing"
        if self._sending is None:
            return "idle"
        return "relaying" if self._sending.ek else "opening"

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Of the last block that was begun."""
        return self._paths

    def rate(self, now: float) -> float:
        """Keys per second, end to end, over the last half minute."""
        while self._done and now - self._done[0][0] > _RATE_SPAN:
            self._done.popleft()
        if len(self._done) < 2:
            return 0.0
        span = max(now - self._done[0][0], 1e-9)
        return sum(keys for _at, keys in list(self._done)[1:]) / span

    def next_time(self) -> float:
        if self._prepared:
            return self._next_send
        if self._sending:
            return min(self._sending.until, self._sending.until if self._sending.ek else self._next_send)
        return self._next_start

    def tick(self, now: float) -> None:
        if self._prepared:
            if now >= self._next_send:
                self._send_commit(self._prepared, now)
        elif self._sending is None:
            if now >= self._next_start:
                self._begin(now)
        elif now >= self._sending.until:
            self._give_up(self._sending, f"{self._target!r} did not confirm in time", now)
        elif not self._sending.ek and now >= self._next_send:
            self._send_open(self._sending.terms, now)

    # Idle -> opening

    def _begin(self, now: float) -> None:
        self._next_start = now + self._wait
        room = min(self._room(), self.connection.block_keys)
        if room < 1:
            self.trouble = "nobody takes the keys"
            return
        try:
            count, paths = self._plan(room, now)
        except NoRoute as error:
            if self.trouble != str(error):
                self._core.tell("no route", connection=self.connection.name, reason=str(error))
            self.trouble = str(error)
            return
        origin = self._core.topology.origin_over(paths)
        block = self._core.store.next_number(self.connection.name)
        transfer = str(uuid.UUID(bytes=self._core.random(16), version=4))
        terms = shares.Terms(transfer, self.connection.name, block, count, paths, origin.value)
        if paths != self._paths:
            self._core.tell("route", connection=self.connection.name, paths=paths)
        self._paths = paths
        self._sending = _Sending(terms, now + GIVE_UP)
        self._send_open(terms, now)

    def _plan(self, most: int, now: float) -> tuple[int, tuple[tuple[str, ...], ...]]:
        """How many keys, over which paths; links that live on their stock only where there are no others."""
        error = NoRoute("")
        for only_up in (True, False):
            capacity = self._stocks.capacity(now, only_up=only_up)
            count = most
            while count:
                need = onetime.units_for(shares.wrapped_bytes(count))
                wanted = self.connection.paths, self.connection.max_hops, need
                try:
                    return count, tuple(routes.disjoint_paths(capacity, *self.connection.ends, *wanted))
                except NoRoute as found:
                    error, count = found, count // 2
        raise error

    def _send_open(self, terms: shares.Terms, now: float) -> None:
        self._next_send = now + RESEND
        message = Open(
            transfer=terms.transfer,
            connection=terms.connection,
            block=terms.block,
            count=terms.count,
            paths=terms.paths,
            origin=terms.origin,
        )
        self._core.send(self._target, message)

    # Opening -> relaying

    def ready(self, said: Ready, now: float) -> None:
        sending = self._sending
        if sending is None or sending.terms.transfer != said.transfer or sending.ek:
            return
        try:
            wrapping, sending.kem = shares.encapsulate_untrusted(said.ek)
        except NotAuthentic as error:
            self._give_up(sending, str(error), now)
            return
        sending.ek, terms = said.ek, sending.terms
        sending.secret, parts = shares.new_shares(terms.count, len(terms.paths), self._core.random)
        for index, part in enumerate(parts):
            wrapped = shares.wrap(wrapping, terms, index, part)
            part[:] = bytes(len(part))
            self._relays.begin(self._header(terms, sending.kem, index), wrapped, now)
            if self._sending is not sending:
                return  # the first hop failed

    @staticmethod
    def _header(terms: shares.Terms, kem: bytes, index: int) -> Header:
        return Header.model_construct(
            transfer=terms.transfer,
            connection=terms.connection,
            block=terms.block,
            count=terms.count,
            path=terms.paths[index],
            index=index,
            hop=0,
            attempt=1,
            kem=kem,
            link="",
            pad=(),
            mac="",
        )

    def failed(self, ack: Ack, now: float) -> None:
        """A hop of one of our shares failed."""
        sending = self._sending
        if sending is None or sending.terms.transfer != ack.transfer:
            return
        if len(ack.at) == 2 and self._core.topology.links_between(*ack.at):
            self._stocks.shun_link(ack.at[0], ack.at[1], now + SHUN_LINK)
        self._give_up(sending, " to ".join(ack.at) + ": " + ack.message, now)

    # Relaying -> committing

    def proof(self, said: Proof, now: float) -> None:
        if self._prepared and self._prepared.transfer == said.transfer:
            self._send_commit(self._prepared, now)
            return
        sending = self._sending
        if sending is None or sending.terms.transfer != said.transfer or sending.secret is None:
            return
        terms, secret = sending.terms, sending.secret
        try:
            shares.confirm(shares.confirmation(secret, terms, sending.ek, sending.kem, by_target=True), said.tag)
        except NotAuthentic as error:
            self._core.tell("unconfirmed", connection=self.connection.name, reason=str(error))
            self._give_up(sending, str(error), now)
            return
        tag = shares.confirmation(secret, terms, sending.ek, sending.kem, by_target=False)
        facts = Facts(self._core.topology.origin_over(terms.paths), hops_over(terms.paths), terms.paths)
        block = Block(self.connection.name, terms.block, terms.transfer, facts, bytearray(secret.keys), tag)
        self._core.store.prepare(block)
        secret.wipe()
        self._relays.forget(terms.transfer)
        self._sending, self._prepared, self._resend = None, block, RESEND
        self._send_commit(block, now)

    def _send_commit(self, block: Block, now: float) -> None:
        self._next_send = now + self._resend
        self._resend = min(2 * self._resend, _LONGEST_RESEND)
        message = Commit(transfer=block.transfer, connection=self.connection.name, tag=block.tag)
        self._core.send(self._target, message)

    # The target's word

    def verdict(self, said: Verdict, now: float) -> None:
        if self._prepared and self._prepared.transfer == said.transfer:
            self._settle(self._prepared, said, now)
        elif self._sending and self._sending.terms.transfer == said.transfer and not said.committed:
            terms = self._sending.terms
            if 0 <= said.index < len(terms.paths):
                for node in terms.paths[said.index][1:-1]:
                    self._stocks.shun_node(node, now + (SHUN_ALTERED if said.altered else SHUN_LATE))
            self._give_up(self._sending, said.message, now)

    def _settle(self, block: Block, said: Verdict, now: float) -> None:
        self._core.store.settle(block, committed=said.committed)
        self._prepared = None
        self._next_start = now
        name, count = self.connection.name, len(block.keys) // 32
        if not said.committed:
            self._core.tell("given up", connection=name, block=block.block, reason=said.message)
            return
        self._wait, self.trouble = _PAUSE, ""
        self._done.append((now, count))
        if self.connection.keys_per_second:
            self._next_start = now + count / self.connection.keys_per_second
        self._core.tell(
            "committed",
            connection=name,
            block=block.block,
            keys=count,
            peer=self._target,
            origin=block.facts.origin.value,
            hops=block.facts.hops,
            paths=block.facts.paths,
        )

    def _give_up(self, sending: _Sending, reason: str, now: float) -> None:
        """Nobody has the block: the target is told, and so is everybody on the way."""
        terms = sending.terms
        self._sending = None
        self.trouble = reason
        if sending.secret:
            sending.secret.wipe()
        self._relays.forget(terms.transfer)
        message: Message = Void(transfer=terms.transfer)
        for node in dict.fromkeys(itertools.chain(*(path[1:] for path in terms.paths))):
            self._core.send(node, message)
        self._next_start = now + self._wait
        self._wait = min(2 * self._wait, _LONGEST_PAUSE)
        self._core.tell("given up", connection=self.connection.name, block=terms.block, reason=reason)
