"""Performs the steps of a block: frames to the channel, pulses to the fibre, tickets to disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from keysource.qkd.distill.party import Answer, Fly, Keep, Outcome, Party, Receive, Send, Step, Steps
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.ahead import Ahead
from keysource.qkd.engine.channel import Channel
from keysource.qkd.engine.frontends import Flown
from keysource.qkd.errors import PeerLost

_LIGHT = (Kind.ASK, Kind.PARITY, Kind.READY)
"""Frames whose answer is worked out at once; the others are worth a thread, so that the device socket goes on."""

_WATCH = 0.5


async def drive(
    party: Party, channel: Channel, hardware: Ahead, keep: Callable[[list[bytes]], None], patience: float
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
                answer = await _fly(hardware.fly(party.block, party.plan.pulses, seed, patience), channel)
            case Keep(tickets):
                keep(tickets)


async def _fly(flight: Coroutine[Any, Any, Flown], channel: Channel) -> Flown:
    """Wait for the pulses, but not for a peer that is gone."""
    task = asyncio.create_task(flight)
    try:
        while not (await asyncio.wait([task], timeout=_WATCH))[0]:
            if channel.closed:
                raise PeerLost("the peer closed the classical channel while the pulses flew")
        return task.result()
    finally:
        task.cancel()


def _advance(steps: Steps, answer: Answer) -> Step | Outcome:
    """The generator's next step, or what it returns (StopIteration cannot leave a thread)."""
    try:
        return steps.send(answer)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
