"""The fibre process: glass, detectors and Eve.  It is nature: both sites tell it their settings, Bob gets clicks.

Each site sends ``PREPARE`` (block u64, run 8 bytes, pulses u64, plan digest 32 bytes, settings seed 32 bytes,
efficiency test u8).  When both have sent the same block and run, its pulses fly, in slices: at ``pace = realtime`` a
slice is done when its light has arrived.  Then Alice is told ``FLOWN`` (block u64, run) and Bob ``FLOWN`` with both
and a detection record (``keysource.qkd.records``); with a source of pairs, which is in the fibre, Alice gets a record
of her own.
``REFUSED`` carries a sentence, ``WELCOME`` the pace.

Eve and the weather are switched at the control socket: one JSON object with any of ``attack``, ``fraction``,
``mode``, ``weather``; or ``notes``: what Eve has of that block (``engine.notebook``).
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog

from keysource.base import End
from keysource.qkd.config import Address, Pace
from keysource.qkd.engine import seal
from keysource.qkd.engine.control import Control
from keysource.qkd.engine.notebook import notes_answer
from keysource.qkd.errors import BadFrame, LinkError, PeerLost
from keysource.qkd.optics.attacks import make_eve
from keysource.qkd.optics.entangled import AnyOptics
from keysource.qkd.optics.eve import Eve, Notes
from keysource.qkd.optics.flight import acts_on, make_flight
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.weather import WEATHERS, Sky
from keysource.qkd.presets import Preset
from keysource.qkd.records import encode_detections

log = structlog.get_logger("qkd.fibre")
SLICE_SECONDS = 0.25
"""Eve acts from the next slice on."""
_KEPT_NOTES = 4
"""Blocks."""


class Order(NamedTuple):
    """What one site has prepared."""

    block: int
    run: bytes
    pulses: int
    digest: bytes
    seed: bytes
    test: int


@dataclass(slots=True)
class _Seat:
    sealed: seal.Sealed
    order: Order | None = field(default=None, repr=False)


def _digests(preset: Preset) -> set[bytes]:
    """Of the plans that two ends may agree on: with tests of the efficiency and without."""
    found = set()
    for tests in (False, True):
        with contextlib.suppress(ValueError):  # with tests a small block may have no key
            plan = preset.plan(tests=tests)
            found.add(bytes.fromhex(plan.digest(preset.optics, preset.security)))
    return found


class Fibre:
    """One link's fibre, as a server for its two ends."""

    def __init__(self, listen: Address, preset: Preset, pace: Pace, control: Path | None, key: bytes) -> None:
        self._listen, self._preset, self._pace, self._key = listen, preset, pace, key
        self._digests = _digests(preset)
        self._pulses = preset.pulses
        self._eve = Eve()
        self._sky = Sky(WEATHERS[preset.weather])
        self._nature = np.random.default_rng()  # nature may be a statistical generator; settings never are
        self._seats: dict[End, _Seat] = {}
        self._flight: asyncio.Task[None] | None = None
        self._landed: set[asyncio.Task[None]] = set()
        self._control = None if control is None else Control(control, self._command)
        self._server: asyncio.Server | None = None
        self._notebook: deque[tuple[int, Notes | None]] = deque(maxlen=_KEPT_NOTES)
        self.blocks = self.flown = 0
        self.busy = 0.0

    async def start(self) -> None:
        """Listen.  Raises :class:`LinkError` where the address cannot be used."""
        try:
            self._server = await asyncio.start_server(self._serve, self._listen.host, self._listen.port)
        except OSError as error:
            raise LinkError(f"the fibre cannot listen at {self._listen}: {error.strerror or error}") from None
        if self._control is not None:
            await self._control.start()
        log.info("fibre listens", address=str(self._listen), preset=self._preset.name, pace=self._pace)

    async def aclose(self) -> None:
        if self._control is not None:
            await self._control.aclose()
        if self._server is not None:
            self._server.close()
        self._stop_flight()
        for task in list(self._landed):
            task.cancel()
        for seat in list(self._seats.values()):
            await seat.sealed.aclose()

    # Eve's switch

    def _command(self, request: dict[str, Any]) -> dict[str, Any]:
        if "notes" in request:
            return notes_answer(request["notes"], self._notebook)
        known = {"attack", "fraction", "mode"}
        if request.keys() & known:
            eve = make_eve(request)
            if not acts_on(eve, self._preset.optics):
                raise LinkError(f"{eve.name} needs weak pulses; on a link of pairs Eve may intercept-resend or blind")
            self._eve = eve
            log.info("Eve", attack=self._eve.name, fraction=self._eve.fraction)
        if "weather" in request:
            if request["weather"] not in WEATHERS:
                raise LinkError(f"weather is one of {', '.join(WEATHERS)}")
            self._sky.weather = WEATHERS[request["weather"]]
        return {
            "attack": self._eve.name,
            "fraction": self._eve.fraction,
            "weather": next((name for name, each in WEATHERS.items() if each == self._sky.weather), "?"),
            "preset": self._preset.name,
            "pace": self._pace,
            "blocks": self.blocks,
            "pulses_flown": self.flown,
            "busy_seconds": round(self.busy, 3),
            "ends": sorted(end.value for end in self._seats),
        }

    # The two sites

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seat: _Seat | None = None
        end = End.A
        try:
            async with asyncio.timeout(10):
                end, sealed = await seal.accept(reader, writer, self._key)
                await sealed.send(seal.WELCOME, self._pace.encode())
            while True:
                order = self._order_untrusted(*await sealed.receive())
                if seat is None:
                    seat = await self._take_seat(end, sealed)
                await self._prepare(seat, order)
        except (PeerLost, TimeoutError):
            pass
        except BadFrame as error:
            log.warning("connection refused", reason=str(error))
        finally:
            if seat is not None and self._seats.get(end) is seat:
                del self._seats[end]
                self._stop_flight()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _take_seat(self, end: End, sealed: seal.Sealed) -> _Seat:
        """Only the first frame under the link's key seats a client: a stranger unseats nobody."""
        old = self._seats.get(end)
        seat = self._seats[end] = _Seat(sealed)
        self._stop_flight()
        if old is not None:
            await old.sealed.aclose()
        return seat

    def _order_untrusted(self, kind: int, payload: bytes) -> Order:
        if kind != seal.PREPARE or len(payload) != seal.PREPARE_FORM.size:
            raise BadFrame("a site that prepares nothing")
        return Order(*seal.PREPARE_FORM.unpack(payload))

    async def _prepare(self, seat: _Seat, order: Order) -> None:
        if order.digest not in self._digests or order.pulses != self._pulses:
            await seat.sealed.send(seal.REFUSED, b"the fibre has another preset")
            return
        self._stop_flight()
        seat.order = order
        both = [self._seats.get(end) for end in (End.A, End.B)]
        orders = [s.order for s in both if s is not None and s.order is not None]
        if len(orders) == 2 and orders[0][:2] == orders[1][:2]:
            self._flight = asyncio.create_task(self._fly(*orders))
            for each in self._seats.values():
                each.order = None  # whatever comes of it: settings that have flown never fly again

    def _stop_flight(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
            self._flight = None

    # The pulses

    async def _fly(self, alice: Order, bob: Order) -> None:
        optics = self._preset.optics
        light = make_flight(optics, alice.seed, bob.seed, test=bool(bob.test))
        loop = asyncio.get_running_loop()
        start = loop.time()
        for (first, count), part in self._slices():
            if self._pace == "realtime":
                arrival = start + (first + count) / optics.pulse_rate
                await asyncio.sleep(max(0.0, arrival - loop.time()))
            began = loop.time()
            self._sky.step(count / optics.pulse_rate, self._nature)
            now, span, eve = self._sky.over(part), (first, count), self._eve  # whatever she is at this moment
            await asyncio.to_thread(light.slice, now, span, eve, self._nature)
            self.busy += loop.time() - began
            self.flown += count
        self.blocks += 1
        hers, seen = light.reports()
        self._notebook.append((alice.block, seen.notes))
        self._land()
        with contextlib.suppress(LinkError, KeyError):
            await self._report(alice, hers, seen)

    def _land(self) -> None:
        """An order of the next block, which may come before the second end has its report, must not stop this."""
        if self._flight is not None:
            self._landed.add(self._flight)
            self._flight.add_done_callback(self._landed.discard)
            self._flight = None

    def _slices(self) -> list[tuple[tuple[int, int], AnyOptics]]:
        """((first pulse, pulses), optics) of each slice; a new one where the block's course changes."""
        live = self._pace == "realtime" or not self._sky.weather.calm
        wanted = max(1, round(self._preset.block_seconds / SLICE_SECONDS)) if live else 1
        edges = {self._pulses * i // wanted for i in range(wanted + 1)}
        stretches = self._preset.optics.stretches()
        ends = [round(self._pulses * share) for share in accumulate(share for share, _part in stretches)]
        cuts = sorted(edges | set(ends[:-1]))
        return [
            ((low, high - low), stretches[min(bisect_right(ends, low), len(stretches) - 1)][1])
            for low, high in pairwise(cuts)
        ]

    async def _report(self, order: Order, alice: Detections | None, bob: Detections) -> None:
        number = order.block.to_bytes(8, "big") + order.run
        record = b"" if alice is None else encode_detections(alice, self._pulses)
        await self._seats[End.A].sealed.send(seal.FLOWN, number + record)
        await self._seats[End.B].sealed.send(seal.FLOWN, number + encode_detections(bob, self._pulses))
