"""Cascade, measured: both parties in one process as the peers have it, and through two processes as a link has it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits, unpack_untrusted
from keysource.qkd.distill.cascade import Corrector, Reference, block_sizes
from keysource.qkd.distill.layout import lanes_of
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.channel import Channel
from keysource.qkd.errors import LinkError
from keysource.qkd.rates.entropy import binary_entropy

RATIOS = (0.01, 0.02, 0.03, 0.05)
RNG_SEED = 11
_ANSWERER = "keysource.qkd.bench.answerer"
Correct = Callable[[Bits, Bits, float], tuple[Bits, int | None, int | None]]
"""(Alice's bits, Bob's, expected ratio) -> (Bob's corrected, parities disclosed, messages)."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """``f`` leak over the entropy of the errors that were there (None: not counted), ``failed`` of ``frames`` still
    differed, ``mbits`` key bits per CPU second of one process in millions."""

    who: str
    bits: int
    """Of a frame."""
    ratio: float
    frames: int
    f: float | None
    failed: int
    messages: float | None
    """Per key."""
    mbits: float
    side: int = 1
    """Frames of a key, side by side."""


@dataclass(frozen=True, slots=True)
class Talked:
    """Through two processes: key bits per second of wall clock, and CPU seconds of both ends."""

    schedule: str
    bits: int
    ratio: float
    keys: int
    f: float
    failed: int
    """Keys that still differed."""
    messages: float
    mbits: float
    alice_seconds: float
    bob_seconds: float


def alices_key(bits: int, number: int) -> Bits:
    return np.random.default_rng([RNG_SEED, number]).integers(0, 2, bits, dtype=np.uint8)


def bobs_key(bits: int, ratio: float, number: int) -> Bits:
    nature = np.random.default_rng([RNG_SEED + 1, number])
    return alices_key(bits, number) ^ (nature.random(bits) < ratio).astype(np.uint8)


def wrong_frames(alice: Bits, bob: Bits, lanes: int) -> int:
    """How many of the frames of a key, which lie side by side, still differ."""
    return len(np.unique(np.flatnonzero(alice != bob) % lanes))


def measured(who: str, correct: Correct, bits: int, ratio: float, keys: int, lanes: int = 1) -> Corrected:
    """``keys`` keys through a Cascade, one after the other, each of ``lanes`` frames."""
    seconds, leak, failed, talk, entropy = 0.0, 0, 0, 0, 0.0
    counted = talked = True
    for number in range(keys):
        alice, bob = alices_key(bits, number), bobs_key(bits, ratio, number)
        began = time.process_time()
        mine, parities, messages = correct(alice, bob, ratio)
        seconds += time.process_time() - began
        failed += wrong_frames(alice, np.asarray(mine), lanes)
        counted, talked = counted and parities is not None, talked and messages is not None
        leak, talk = leak + (parities or 0), talk + (messages or 0)
        entropy += bits * binary_entropy(float((alice ^ bob).mean()))
    f, said = leak / entropy if counted else None, talk / keys if talked else None
    return Corrected(who, bits // lanes, ratio, keys * lanes, f, failed, said, keys * bits / seconds / 1e6, lanes)


def ours(schedule: str) -> Correct:
    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        seed, sizes = os.urandom(32), block_sizes(len(alice), ratio, schedule)
        reference, corrector = Reference(alice, seed, sizes), Corrector(bob, seed, sizes)
        work, asked, messages = corrector.run(), 0, 0
        question = next(work, None)
        while question is not None:
            answers = reference.answer_untrusted(question)
            asked, messages = asked + len(answers), messages + 1
            try:
                question = work.send(answers)
            except StopIteration:
                break
        return corrector.bits, asked, messages

    return correct


def in_one_process(quick: bool) -> list[Corrected]:
    """Single frames of 2^14 bits, keys of 2^17 and 2^20: that many frames side by side."""
    found = []
    for bits, count in ((1 << 14, 16), (1 << 17, 8), (1 << 20, 4)):
        for schedule in ("optimised", "original"):
            for ratio in RATIOS:
                lanes = lanes_of(bits, max(block_sizes(bits, ratio, schedule)))
                who = f"qvpn, {schedule}" + (f", {lanes} at once" if lanes > 1 else "")
                found.append(measured(who, ours(schedule), bits, ratio, 1 if quick else count, lanes))
    return found


# Two processes


def in_two_processes(quick: bool, ratios: Sequence[float] = RATIOS) -> list[Talked]:
    """Keys of 2^20 bits between this process and another, over TCP on the loopback with the link's own frames."""
    return asyncio.run(_in_two_processes(1 if quick else 4, ratios))


async def _in_two_processes(keys: int, ratios: Sequence[float]) -> list[Talked]:
    found = []
    async with _answerer() as channel:
        for schedule in ("original", "optimised"):
            await _talk(channel, schedule, 1 << 16, 0.02, 1)  # both have imported, and touched their memory
            found += [await _talk(channel, schedule, 1 << 20, ratio, keys) for ratio in ratios]
    return found


@asynccontextmanager
async def _answerer() -> AsyncIterator[Channel]:
    """Alice's process, which dies with this one."""
    command = [sys.executable, "-m", "keysource.simulated.leash", str(os.getpid()), _ANSWERER]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            line = await process.stdout.readline() if process.stdout is not None else b""
            if not line:
                raise LinkError("the answering process did not start")
            channel = Channel(*await asyncio.open_connection("127.0.0.1", int(line)))
        try:
            yield channel
        finally:
            await channel.aclose()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _talk(channel: Channel, schedule: str, bits: int, ratio: float, keys: int) -> Talked:
    wall, mine, hers, leak, failed, messages, entropy = 0.0, 0.0, 0.0, 0, 0, 0, 0.0
    for number in range(keys):
        await channel.send(Frame(Kind.HELLO, json.dumps([schedule, bits, ratio, number]).encode()))
        await channel.receive()  # she has her key
        alice, bob = alices_key(bits, number), bobs_key(bits, ratio, number)
        began, used = time.perf_counter(), time.process_time()
        fixed, parities, said = await _correct(channel, schedule, bob, ratio)
        wall, mine = wall + time.perf_counter() - began, mine + time.process_time() - used
        hers += json.loads((await channel.receive()).payload)
        failed += bool((fixed != alice).any())
        leak, messages = leak + parities, messages + said
        entropy += bits * binary_entropy(float((alice ^ bob).mean()))
    speed = keys * bits / wall / 1e6
    return Talked(schedule, bits, ratio, keys, leak / entropy, failed, messages / keys, speed, hers, mine)


async def _correct(channel: Channel, schedule: str, bob: Bits, ratio: float) -> tuple[Bits, int, int]:
    """Bob's end of a key: (corrected, parities, messages)."""
    seed, parities, messages = os.urandom(32), 0, 0
    await channel.send(Frame(Kind.CORRECT, seed))
    corrector = Corrector(bob, seed, block_sizes(len(bob), ratio, schedule))
    work = corrector.run()
    question = next(work, None)
    while question is not None:
        await channel.send(wire.ask(question))
        answers = unpack_untrusted((await channel.receive()).payload, len(question.positions))
        parities, messages = parities + len(answers), messages + 1
        try:
            question = work.send(answers)
        except StopIteration:
            break
    fixed = corrector.bits
    await channel.send(Frame(Kind.CORRECTED))
    return fixed, parities, messages
