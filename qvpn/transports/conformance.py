"""What every :class:`~qvpn.netio.base.Bind` must do, as checks that any implementation can be run through.

An implementation gives an :class:`Arena`: two ends on a network that the arena can disturb, and a way to let time
pass.  :data:`CHECKS` has every check; :func:`run_all` runs them, each in a new arena.  Nothing here knows which
transport it looks at.

::

    for name, problem in run_all(make_arena).items():
        print(name, problem or "passed")
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from qvpn.netio.base import Address, Bind

RECORD = 0x10
"""First byte of every datagram that a check sends, as in a record of ours; who shares a port looks at it."""

SMALL = 64


class NotConforming(AssertionError):
    """The bind does not do what it must; one sentence."""


@dataclass(eq=False)
class End:
    """One end, and what has come out of it."""

    bind: Bind
    to_other: Address
    """Under which this end reaches the other one first."""
    arrived: list[tuple[bytes, Address]] = field(default_factory=list)

    def send(self, *datagrams: bytes) -> int:
        return self.bind.send_batch([memoryview(datagram) for datagram in datagrams], self.to_other)

    def take(self) -> int:
        """Receive what waits, and how many receives that were; the plane calls it the same way."""
        batch = self.bind.receive_batch(16)
        for received in batch:
            segment = received.segment
            require(segment > 0 or not received.length, "a receive with bytes has a segment length")
            for cut in range(0, received.length, segment or 1):
                data = bytes(received.buffer[cut : min(cut + segment, received.length)])
                self.arrived.append((data, received.address))
        return len(batch)

    @property
    def datagrams(self) -> list[bytes]:
        return [data for data, _ in self.arrived]


class Arena(Protocol):
    """Two ends that can reach each other; ``left`` knows where ``right`` is from the start."""

    left: End
    right: End

    def run(self, seconds: float) -> None:
        """Let time pass; whatever arrives is taken with :meth:`End.take`."""

    def lose(self, share: float) -> bool:
        """From now on the network loses this share of datagrams; False: this arena cannot."""

    def move_left(self) -> bool:
        """Give the left end another address, without a word to its bind; False: this arena cannot."""


MakeArena = Callable[[], AbstractContextManager[Arena]]
Check = Callable[[Arena], None]


def require(condition: bool, otherwise: str) -> None:
    """Raises :class:`NotConforming`."""
    if not condition:
        raise NotConforming(otherwise)


def numbered(count: int, size: int = SMALL) -> list[bytes]:
    """Datagrams that differ."""
    return [(bytes([RECORD, 1]) + number.to_bytes(4, "big")).ljust(size, b"\xa5") for number in range(count)]


def _until(arena: Arena, done: Callable[[], bool], within: float, otherwise: str) -> None:
    """Let time pass in small steps."""
    for _ in range(int(within / 0.02) + 1):
        if done():
            return
        arena.run(0.02)
    require(done(), otherwise)


def _met(arena: Arena) -> None:
    """Both ends have heard of each other, so that the right one knows where the left one is."""
    arena.left.send(b"\x10 hello")
    _until(arena, lambda: bool(arena.right.arrived), 3, "the first datagram arrives")
    arena.right.to_other = arena.right.arrived[-1][1]
    arena.right.send(b"\x10 answer")
    _until(arena, lambda: bool(arena.left.arrived), 3, "an answer to the address of the first datagram arrives")
    arena.left.arrived.clear()
    arena.right.arrived.clear()


def first_datagram_arrives(arena: Arena) -> None:
    """What is sent before anything else is not lost to a connection that has yet to open."""
    _met(arena)


def order_and_content(arena: Arena) -> None:
    """On a network that keeps order, datagrams arrive as they are, in order, each once."""
    _met(arena)
    sent = numbered(200)
    for first in range(0, len(sent), 20):
        require(arena.left.send(*sent[first : first + 20]) == 20, "an idle bind takes 20 datagrams")
        arena.run(0.02)
    _until(arena, lambda: len(arena.right.arrived) >= 200, 2, "all arrive")
    require(arena.right.datagrams == sent, "in order, unchanged, each once")


def sizes(arena: Arena) -> None:
    """Every length up to ``max_payload`` passes and comes out as it went in."""
    _met(arena)
    most = arena.left.bind.max_payload(arena.left.to_other)
    require(most >= 576, "max_payload leaves room for the smallest inner packet")
    lengths = [1, 2, 15, 16, 17, SMALL, 576, 1170, min(1171, most), most // 2, most - 1, most]
    sent = [bytes([RECORD]).ljust(length, b"\x5a") for length in lengths]
    for datagram in sent:
        require(arena.left.send(datagram) == 1, f"{len(datagram)} bytes of {most} are taken")
        arena.run(0.02)
    _until(arena, lambda: len(arena.right.arrived) >= len(sent), 2, "all lengths arrive")
    require([len(d) for d in arena.right.datagrams] == lengths, "each with its own length")


def oversize_blocks_nothing(arena: Arena) -> None:
    """A datagram over ``max_payload`` is refused and counted, and those after it pass."""
    _met(arena)
    most, errors = arena.left.bind.max_payload(arena.left.to_other), sum(arena.left.bind.errors.values())
    for extra in (1, 100, 60_000):
        require(arena.left.send(bytes([RECORD]) * (most + extra)) == 0, f"{extra} bytes too long are refused")
    require(sum(arena.left.bind.errors.values()) >= errors + 3, "each refusal is counted in errors")
    require(arena.left.send(*numbered(3)) == 3, "the next ones are taken")
    _until(arena, lambda: len(arena.right.arrived) >= 3, 2, "and arrive")
    require(arena.right.datagrams == numbered(3), "the right ones arrive")


def fragmentable(arena: Arena) -> None:
    """``send_fragmentable`` carries what ``max_payload`` allows, whole."""
    _met(arena)
    most = arena.left.bind.max_payload(arena.left.to_other)
    sent = [bytes([RECORD]) * length for length in (SMALL, 1200, most)]
    for datagram in sent:
        taken = arena.left.bind.send_fragmentable([memoryview(datagram)], arena.left.to_other)
        require(taken == 1, f"{len(datagram)} bytes are taken")
        arena.run(0.05)
    _until(arena, lambda: len(arena.right.arrived) >= len(sent), 2, "all arrive")
    require(sorted(arena.right.datagrams) == sorted(sent), "whole and unchanged")


def segments(arena: Arena) -> None:
    """``send_segments`` cuts where it is told; the last piece may be shorter."""
    _met(arena)
    for count, size, last in ((1, 100, 100), (7, 500, 3), (44, 1100, 1100), (64, 300, 17)):
        before = len(arena.right.arrived)
        pieces = numbered(count, size)
        pieces[-1] = pieces[-1][:last]
        taken = arena.left.bind.send_segments(memoryview(b"".join(pieces)), size, arena.left.to_other)
        require(taken == count, f"all of {count} segments are taken")
        _until(arena, lambda: len(arena.right.arrived) >= before + count, 2, f"{count} segments arrive")  # noqa: B023
        require(arena.right.datagrams[before:] == pieces, f"{count} segments of {size} bytes come out as such")


def loss_stays_loss(arena: Arena) -> None:
    """What the network loses is gone: nothing is repeated, nothing held back for it."""
    _met(arena)
    if not arena.lose(0.1):
        return
    sent = numbered(400)
    for datagram in sent:
        arena.left.send(datagram)
        arena.run(0.004)
    arena.run(1.0)
    got = arena.right.datagrams
    require(len(set(got)) == len(got), "nothing arrives twice")
    require(set(got) <= set(sent), "nothing else arrives")
    require(300 <= len(got) < 400, f"about a tenth is lost, not {400 - len(got)} of 400")
    arena.lose(0.0)
    arena.right.arrived.clear()
    arena.left.send(b"\x10 after")
    _until(arena, lambda: b"\x10 after" in arena.right.datagrams, 5, "the next one arrives once nothing is lost")


def backpressure(arena: Arena) -> None:
    """A sender faster than the network is told so or loses, with a bound on what is kept and no wait afterwards."""
    _met(arena)
    big = bytes([RECORD]) * 1100
    for _ in range(400):
        arena.left.bind.send_segments(memoryview(big * 40), 1100, arena.left.to_other)
    arena.run(1.5)
    arena.right.arrived.clear()
    _until(arena, lambda: arena.left.send(b"\x10 small") == 1, 5, "it takes datagrams again")
    _until(arena, lambda: b"\x10 small" in arena.right.datagrams, 0.5, "and the next one arrives at once")


def counts_add_up(arena: Arena) -> None:
    """Where the network loses nothing, what was taken arrives or is told (:meth:`~qvpn.netio.base.Bind.unsent`)."""
    _met(arena)
    left, taken = arena.left, 0
    left.bind.unsent()
    for _ in range(5):
        taken += left.bind.send_segments(memoryview(b"".join(numbered(40, 300))), 300, left.to_other)
        arena.run(0.02)
    _until(arena, lambda: left.bind.waiting(left.to_other) == (0, 0), 2, "nothing waits for ever")
    arena.run(0.2)
    dropped = sum(datagrams for _, datagrams, _ in left.bind.unsent())
    got = len(arena.right.arrived)
    require(got + dropped == taken, f"{taken} were taken, {got} arrived and {dropped} are told to be dropped")


def both_ways(arena: Arena) -> None:
    """Directions do not hold each other up."""
    _met(arena)
    for number in range(50):
        arena.left.send(b"\x10 l%d" % number)
        arena.right.send(b"\x10 r%d" % number)
        arena.run(0.01)
    _until(arena, lambda: len(arena.left.arrived) >= 50 and len(arena.right.arrived) >= 50, 2, "all arrive")


def address_change(arena: Arena) -> None:
    """After the left end's address changed, its datagrams arrive from the new one, and answers reach it there."""
    _met(arena)
    before = arena.right.to_other
    if not arena.move_left():
        return

    def sends_until_heard() -> bool:
        arena.left.send(b"\x10 moved")
        return b"\x10 moved" in arena.right.datagrams

    _until(arena, sends_until_heard, 10, "datagrams from the new address arrive")
    arena.right.to_other = arena.right.arrived[-1][1]
    require(arena.right.to_other != before, "they come from another address than before")

    def answers_until_heard() -> bool:
        arena.right.send(b"\x10 found")
        return b"\x10 found" in arena.left.datagrams

    _until(arena, answers_until_heard, 5, "answers reach the new address")


def connecting_is_a_hint(arena: Arena) -> None:
    """``connect`` and ``disconnect`` may be called at any time, and datagrams pass before and after."""
    left = arena.left
    left.bind.connect(left.to_other)
    left.bind.connect(left.to_other)
    _met(arena)
    left.bind.disconnect(left.to_other)
    left.bind.disconnect(left.to_other)
    arena.run(1.2)

    def sends_until_heard() -> bool:
        left.send(b"\x10 again")
        return b"\x10 again" in arena.right.datagrams

    _until(arena, sends_until_heard, 5, "datagrams pass after disconnect")


def nobody_there(arena: Arena) -> None:
    """Nothing raises while the other end is gone, and nothing piles up."""
    _met(arena)
    arena.right.bind.close()
    for _ in range(20):
        arena.left.send(*numbered(10))
        arena.run(0.05)


def close(arena: Arena) -> None:
    """After ``close``, which may be called twice, nothing is sent or received, and nothing raises."""
    _met(arena)
    for _ in range(2):
        arena.left.bind.close()
    require(arena.left.bind.filenos() == [], "no descriptor is left")
    require(arena.left.send(b"\x10 late") == 0, "nothing is taken")
    require(arena.left.take() == 0, "nothing comes")
    arena.run(0.5)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        first_datagram_arrives,
        order_and_content,
        sizes,
        oversize_blocks_nothing,
        fragmentable,
        segments,
        loss_stays_loss,
        backpressure,
        counts_add_up,
        both_ways,
        address_change,
        connecting_is_a_hint,
        nobody_there,
        close,
    )
}


def run_all(make: MakeArena) -> dict[str, str | None]:
    """Each check by name, and what was wrong; None: passed."""
    found: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        with make() as arena:
            try:
                check(arena)
                found[name] = None
            except NotConforming as problem:
                found[name] = str(problem)
    return found
