"""The end that does not begin: it puts the shares together, proves it, and has the last word on every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from keysource.network import crashes, shares
from keysource.network.core import ARRIVAL, DECIDED, RESEND, Core
from keysource.network.errors import NotAuthentic
from keysource.network.messages import Commit, Header, Open, Proof, Ready, Verdict, Void
from keysource.network.rows import Block, Facts
from keysource.network.topology import Connection, hops_over

_MOST_SKIPPED = 2**32


@dataclass(slots=True)
class _Pending:
    """A block of which some shares are here, in memory only."""

    terms: shares.Terms
    private: shares.PrivateKey = field(repr=False)
    ready: Ready
    until: float
    kem: bytes = b""
    parts: dict[int, bytearray] = field(default_factory=dict, repr=False)
    secret: shares.Secret | None = field(default=None, repr=False)
    proof: Proof | None = None
    next_send: float = 0.0


class Target:
    """One connection whose second end is here.  ``room`` gives how many keys may be delivered now."""

    def __init__(self, core: Core, connection: Connection, room: Callable[[], int]) -> None:
        self._core, self.connection, self._room = core, connection, room
        self._initiator = connection.ends[0]
        self._pending: _Pending | None = None
        self._floor = core.store.last(connection.name)[0]
        """No block below is begun (again)."""

    def next_time(self) -> float | None:
        if self._pending is None:
            return None
        return min(self._pending.until, self._pending.next_send if self._pending.proof else self._pending.until)

    def tick(self, now: float) -> None:
        pending = self._pending
        if pending is None:
            return
        if now >= pending.until:
            missing = next((i for i in range(self.connection.paths) if i not in pending.parts), -1)
            self._give_up(pending, "a share did not arrive" if missing >= 0 else "no commit came", missing)
        elif pending.proof and now >= pending.next_send:
            self._core.send(self._initiator, pending.proof)
            pending.next_send = now + RESEND

    def open(self, asked: Open, now: float) -> None:
        """A block is on its way."""
        pending = self._pending
        if pending and pending.terms.transfer == asked.transfer:
            self._core.send(self._initiator, pending.ready)
            return
        if asked.transfer == self._core.store.last(self.connection.name)[1]:
            return  # late: it was committed meanwhile, and nothing else may ever be said of it
        if asked.block < self._floor:  # late, or of a backup: what was decided stays
            self._say(asked.transfer, False, "that block number was used before")
            return
        if mistake := self._mistake(asked):
            self._core.tell("refused", connection=self.connection.name, reason=mistake)
            self._say(asked.transfer, False, mistake)
            return
        if pending:
            self._give_up(pending, "another block was begun")
        terms = shares.Terms(asked.transfer, asked.connection, asked.block, asked.count, asked.paths, asked.origin)
        private, ek = shares.new_kem()
        ready = Ready(transfer=asked.transfer, ek=ek)
        self._floor = asked.block
        self._pending = _Pending(terms, private, ready, now + ARRIVAL)
        self._core.send(self._initiator, ready)

    def arrived(self, header: Header, wrapped: bytes, now: float) -> None:
        """A share, authentic as far as its last hop goes."""
        pending = self._pending
        if pending is None or pending.terms.transfer != header.transfer or pending.proof:
            return
        terms, index = pending.terms, header.index
        if header.path != terms.paths[index]:  # a corrupt node's; it must not bring down what the right ones carry
            self._core.tell("refused", connection=self.connection.name, reason="a share came over another path")
            return
        try:
            # Each with its own ciphertext: nobody else knows the public key, so a wrong one is its path's fault.
            secret = shares.decapsulate_untrusted(pending.private, header.kem)
            pending.parts[index] = shares.unwrap_untrusted(secret, terms, index, wrapped)
            pending.kem = header.kem
        except NotAuthentic as error:
            facts = {"connection": self.connection.name, "block": terms.block, "path": terms.paths[index]}
            self._core.tell("altered", **facts, reason=str(error))
            self._give_up(pending, str(error), index, altered=True)
            return
        if len(pending.parts) == self.connection.paths:
            self._prove(pending, now)

    def commit(self, asked: Commit, now: float) -> None:
        """The initiator has the block on its disk.  The answer is the last word, and stays it."""
        if asked.transfer == self._core.store.last(self.connection.name)[1]:
            self._say(asked.transfer, True)
            return
        pending = self._pending
        if pending is None or pending.terms.transfer != asked.transfer or pending.secret is None:
            self._say(asked.transfer, False, "that block is not here")
            if pending and pending.terms.transfer == asked.transfer:
                self._drop(pending)
            return
        terms = pending.terms
        own = shares.confirmation(pending.secret, terms, pending.ready.ek, pending.kem, by_target=False)
        try:
            shares.confirm(own, asked.tag)
        except NotAuthentic as error:
            self._core.tell("unconfirmed", connection=self.connection.name, reason=str(error))
            self._give_up(pending, str(error))
            return
        facts = Facts(self._core.topology.origin_over(terms.paths), hops_over(terms.paths), terms.paths)
        keys = bytearray(pending.secret.keys)
        self._core.store.commit(Block(self.connection.name, terms.block, terms.transfer, facts, keys))
        self._drop(pending)
        self._core.tell(
            "committed",
            connection=self.connection.name,
            block=terms.block,
            keys=terms.count,
            peer=self._initiator,
            origin=facts.origin.value,
            hops=facts.hops,
            paths=facts.paths,
        )
        self._say(asked.transfer, True)

    def void(self, void: Void) -> None:
        if self._pending and self._pending.terms.transfer == void.transfer:
            self._drop(self._pending)

    def _mistake(self, asked: Open) -> str:
        topology, connection = self._core.topology, self.connection
        if asked.count > self._room():
            return "nobody takes the keys there"
        if asked.block > self._floor + _MOST_SKIPPED:
            return "a block number far beyond the last one"
        if asked.count > connection.block_keys:
            return "more keys than the map allows in a block"
        if mistake := topology.paths_mistake(connection, asked.paths):
            return mistake
        if asked.origin != topology.origin_over(asked.paths).value:
            return "the two ends' maps differ in what the links on the way are"
        return ""

    def _prove(self, pending: _Pending, now: float) -> None:
        pending.secret = shares.joined([pending.parts[index] for index in sorted(pending.parts)])
        tag = shares.confirmation(pending.secret, pending.terms, pending.ready.ek, pending.kem, by_target=True)
        pending.proof = Proof(transfer=pending.terms.transfer, tag=tag)
        pending.until, pending.next_send = now + DECIDED, now + RESEND
        crashes.at("proof.made")
        self._core.send(self._initiator, pending.proof)

    def _give_up(self, pending: _Pending, reason: str, index: int = -1, *, altered: bool = False) -> None:
        self._drop(pending)
        self._core.tell("given up", connection=self.connection.name, block=pending.terms.block, reason=reason)
        self._say(pending.terms.transfer, False, reason, index, altered=altered)

    def _drop(self, pending: _Pending) -> None:
        self._pending = None
        self._floor = max(self._floor, pending.terms.block + 1)
        if pending.secret:
            pending.secret.wipe()
        for part in pending.parts.values():
            part[:] = bytes(len(part))

    def _say(
        self, transfer: str, committed: bool, message: str = "", index: int = -1, *, altered: bool = False
    ) -> None:
        verdict = Verdict(transfer=transfer, committed=committed, message=message[:300], index=index, altered=altered)
        self._core.send(self._initiator, verdict)
