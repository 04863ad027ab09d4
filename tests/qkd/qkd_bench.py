"""A workbench for the tests: a small plan, and two ends of a block that talk through a wire the test may touch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from keysource.qkd.audit import Overheard
from keysource.qkd.distill.alice import AliceBlock
from keysource.qkd.distill.bob import BobBlock
from keysource.qkd.distill.mac import TICKET_BYTES, Authenticator, Ticket
from keysource.qkd.distill.party import Answer, Fly, Keep, Outcome, Party, Receive, Send, Step, Terms
from keysource.qkd.distill.wire import Frame, Kind, Start, frame_untrusted
from keysource.qkd.errors import BadFrame, LinkError
from keysource.qkd.optics.entangled import AnyOptics, watched
from keysource.qkd.optics.eve import Eve, InterceptResend
from keysource.qkd.optics.flight import make_flight
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import Monitor, Readings, alarm
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.plan import Plan, make_plan
from keysource.qkd.rates.finite import Decoy, Security
from keysource.qkd.records import detections_untrusted, settings_untrusted

SECURITY = Security(1e-2, 1e-6)
OPTICS = Optics(Decoy(0.5, 0.15, 0.4), 0.65, 1.0, 0.2, 0.9, 1e-7, 0.005, 1e6)
"""A bright, short link with a lax error budget: a block of 200,000 pulses gives key."""

Tamper = Callable[[int, str, bytes], list[bytes]]
"""(number of the frame, "A" or "B" who sent it, kind and payload) -> what arrives instead."""


def small_plan() -> Plan:
    return make_plan(OPTICS, 200_000, SECURITY, "original")


def small_terms(plan: Plan | None = None) -> Terms:
    return Terms(plan or small_plan(), OPTICS.decoy, OPTICS.p_z, SECURITY)


def terms_of(optics: AnyOptics, pulses: int, security: Security = SECURITY, *, tests: bool = False) -> Terms:
    return Terms(make_plan(optics, pulses, security, "original", tests=tests), optics.source, optics.p_z, security)


def untouched(_number: int, _sender: str, body: bytes) -> list[bytes]:
    return [body]


@dataclass
class Side:
    """One end: its party, what waits for it, what became of it."""

    name: str
    party: Party | None
    inbox: deque[bytes] = field(default_factory=deque)
    outcome: Outcome | None = None
    error: LinkError | None = None
    kept: list[bytes] | None = None
    step: Step | None = None
    steps: object = None

    @property
    def done(self) -> bool:
        return self.outcome is not None or self.error is not None


@dataclass
class Bench:
    """Runs one block.  ``log`` lists what was sent: (sender, kind), with ("fibre", "flown") among it."""

    terms: Terms
    tamper: Tamper = untouched
    eve: float | Eve = 0.0
    """A fraction of intercept-resend, or any Eve."""
    monitor: Monitor = "none"
    refills: int = 1
    ticket: Callable[[str], Authenticator] | None = None
    """What "A" and "B" authenticate the block by; None: a ticket of pad that they share."""
    optics: AnyOptics = OPTICS
    nature: int | None = None
    """Seed of what nature does; settings are never seeded."""
    records: tuple[bytes, bytes] | None = None
    """Alice's and Bob's, of somebody else's light."""
    clicks: Callable[[Detections], Detections] = lambda seen: seen
    hers: Callable[[Detections], Detections] = lambda seen: seen
    """What becomes of Alice's detections, with a source of pairs."""
    log: list[tuple[str, str]] = field(default_factory=list)
    frames: list[tuple[str, bytes]] = field(default_factory=list)

    def run(self) -> tuple[Side, Side]:
        """Both ends as far as they get; an end that waits for ever has neither outcome nor error."""
        material = os.urandom(TICKET_BYTES)
        start = Start(7, 0, 1, self.refills)
        alice = AliceBlock(self.terms, start, self._ticket("A", material))
        alice.guard = partial(self._guard, 0)
        self.alice = Side("A", alice)
        self.bob = Side("B", None)
        self.material, self.seeds, self.flown = material, dict[str, bytes](), False
        self._advance(self.alice, None)
        while self._turn(self.alice, self.bob) or self._turn(self.bob, self.alice) or self._fly():
            pass
        return self.alice, self.bob

    def _ticket(self, name: str, material: bytes) -> Authenticator:
        return Ticket(0, material) if self.ticket is None else self.ticket(name)

    def overheard(self) -> Overheard:
        """What somebody on the classical channel, and Eve in the fibre, have of the block."""
        frames = [(sender, frame_untrusted(body)) for sender, body in self.frames]
        return Overheard(frames, self.seen.notes, self.terms.plan)

    def _turn(self, side: Side, other: Side) -> bool:
        """One step of a side; False where it can do nothing."""
        if side.done:
            return False
        if side.party is None:  # Bob before START
            if not side.inbox:
                return False
            try:
                frame = frame_untrusted(side.inbox.popleft())
                if frame.kind is not Kind.START:
                    raise BadFrame("not a START")  # as engine.session does between blocks
                start = Start.from_untrusted(frame.payload)
            except LinkError as error:
                side.error = error
                return True
            side.party = bob = BobBlock(self.terms, start, self._ticket("B", self.material))
            bob.guard = partial(self._guard, 1)
            return self._advance(side, None)
        match side.step:
            case Send(frame):
                self._carry(side, other, frame)
                return self._advance(side, None)
            case Receive():
                if not side.inbox:
                    return False
                try:
                    frame = frame_untrusted(side.inbox.popleft())
                except LinkError as error:
                    side.error = error
                    return True
                return self._advance(side, frame)
            case Keep(tickets):
                side.kept = tickets
                return self._advance(side, None)
            case Fly(seed) if side.name not in self.seeds:
                self.seeds[side.name] = seed
                return True
        return False

    def _guard(self, site: int, readings: Readings | None) -> str | None:
        if readings is None:
            return None if self.monitor == "none" else "no readings"
        return alarm(self.monitor, readings, watched(self.optics, site))

    def _carry(self, side: Side, other: Side, frame: Frame) -> None:
        body = bytes([frame.kind]) + frame.payload
        other.inbox.extend(self.tamper(len(self.frames), side.name, body))
        self.frames.append((side.name, body))
        self.log.append((side.name, frame.kind.name))

    def _fly(self) -> bool:
        if len(self.seeds) < 2 or self.flown:
            return False
        self.flown = True
        if self.records is not None:
            pulses = self.terms.plan.pulses
            self.log.append(("fibre", "flown"))
            self._advance(self.alice, settings_untrusted(self.records[0], pulses))
            return self._advance(self.bob, detections_untrusted(self.records[1], pulses))
        test = self.monitor in ("efficiency", "both")
        light = make_flight(self.optics, self.seeds["A"], self.seeds["B"], test=test)
        span, eve = (0, self.terms.plan.pulses), self.eve if isinstance(self.eve, Eve) else InterceptResend(self.eve)
        light.slice(self.optics, span, eve, np.random.default_rng(self.nature))
        hers, seen = light.reports()
        self.seen = seen
        self.log.append(("fibre", "flown"))
        self._advance(self.alice, None if hers is None else self.hers(hers))
        return self._advance(self.bob, self.clicks(seen))

    def _advance(self, side: Side, answer: Answer) -> bool:
        if side.steps is None:
            assert side.party is not None
            side.steps = side.party.run()
        try:
            side.step = side.steps.send(answer)  # type: ignore[attr-defined]
        except StopIteration as end:
            side.outcome = end.value
        except LinkError as error:
            side.error = error
        return True
