"""Both ends of a block in one process, with a queue for a wire: for benchmarks.  A link never runs like this."""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from keysource.qkd.distill.alice import AliceBlock
from keysource.qkd.distill.bob import BobBlock
from keysource.qkd.distill.mac import TICKET_BYTES, Ticket
from keysource.qkd.distill.party import Answer, Fly, Outcome, Party, Receive, Send, Step, Terms
from keysource.qkd.distill.wire import Frame, Start
from keysource.qkd.optics.entangled import AnyOptics
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.flight import make_flight


class _End:
    def __init__(self, party: Party) -> None:
        self._steps = party.run()
        self.inbox: deque[Frame] = deque()
        self.outcome: Outcome | None = None
        self.step: Step | None = None

    def on(self, answer: Answer) -> None:
        try:
            self.step = self._steps.send(answer)
        except StopIteration as end:
            self.step, self.outcome = None, end.value


def play(terms: Terms, optics: AnyOptics, nature: np.random.Generator) -> tuple[Outcome, Outcome]:
    """One block, (Alice's outcome, Bob's).  Its keys are nobody's: the pad is made up and thrown away."""
    start, pad = Start(0, 0, 1, 1), os.urandom(TICKET_BYTES)
    alice, bob = ends = _End(AliceBlock(terms, start, Ticket(0, pad))), _End(BobBlock(terms, start, Ticket(0, pad)))
    alice.on(None)
    bob.on(None)
    alice_hears_no_start = True
    while alice.outcome is None or bob.outcome is None:
        for end, other in (ends, ends[::-1]):
            if isinstance(end.step, Send):
                if not (end is alice and alice_hears_no_start):
                    other.inbox.append(end.step.frame)
                alice_hears_no_start &= end is not alice  # Bob has the START already
                end.on(None)
            elif isinstance(end.step, Receive) and end.inbox:
                end.on(end.inbox.popleft())
            elif end.step is not None and not isinstance(end.step, Fly | Receive):
                end.on(None)
        if isinstance(alice.step, Fly) and isinstance(bob.step, Fly):
            light = make_flight(optics, alice.step.seed, bob.step.seed)
            light.slice(optics, (0, terms.plan.pulses), Eve(), nature)
            hers, his = light.reports()
            alice.on(hers)
            bob.on(his)
    return alice.outcome, bob.outcome
