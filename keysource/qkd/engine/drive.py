"""Performs the steps of a block: frames to the channel, pulses to the fibre, tickets to disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keysource.qkd.distill.party import Answer, Fly, Keep, Outcome, Party, Receive, Send, Step, Steps
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.channel import Channel
from keysource.qkd.engine.hardware import Hardware

_LIGHT = (Kind.ASK, Kind.PARITY, Kind.READY)
"""Frames whose answer is worked out at once; the others are worth a thread, so that the device socket goes on."""


async def drive(
    party: Party, channel: Channel, hardware: Hardware, keep: Callable[[list[bytes]], None], patience: float
) -> Outcome:
    """Run a block to its outcome.  ``patience``: seconds for the pulses.

    Raises:
        BadFrame, Forged: the other end is not who it should be.
        PeerLost: it, or the fibre, is gone.
        LinkError: the fibre refuses.
    """
    steps = party.run()
    answer: Answer = None
    while True:
        light = answer is None or (isinstance(answer, Frame) and answer.kind in _LIGHT)
        step = _advance(steps, answer) if light else await asyncio.to_thread(_advance, steps, answer)
        answer = None
        match step:
            case Outcome():
                return step
            case Send(frame):
                await channel.send(frame)
            case Receive():
                answer = await channel.receive()
            case Fly(seed):
                answer = await hardware.fly(party.block, party.plan.pulses, seed, patience)
            case Keep(tickets):
                keep(tickets)


def _advance(steps: Steps, answer: Answer) -> Step | Outcome:
    """The generator's next step, or what it returns (StopIteration cannot leave a thread)."""
    try:
        return steps.send(answer)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
