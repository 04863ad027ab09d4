"""The process of a lane is started, watched, and replaced, whatever it does."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qvpn.lanes.keeper import LaneKeeper, LaneKit
from qvpn.lanes.messages import Endpoint, Setup
from tests.unit.dataplane.support import BOB
from tests.unit.lanes.fake_lane import DEAF, DYING, GOOD, MUTE, NONSENSE, SILENT, STOPPED
from tests.unit.lanes.test_lanes_dealing import Log


class Queue:
    """Only a descriptor."""

    def __init__(self) -> None:
        self.descriptor = os.open("/dev/null", os.O_RDWR)

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Watched:
    """A keeper and how often it came and went."""

    def __init__(self, lane: int, silent: float) -> None:
        queue: Any = Queue()
        self.kit = LaneKit(lane, 51840 + lane, queue, socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.came = self.went = 0
        self._was = False
        self.log = Log()
        self.keeper = LaneKeeper(
            self.kit, Setup(lane, ()), self.log, self._changed, module="tests.unit.lanes.fake_lane", silent=silent
        )

    def _changed(self, keeper: LaneKeeper) -> None:
        self.came += keeper.up and not self._was
        self.went += self._was and not keeper.up
        self._was = keeper.up

    async def until(self, ready: Callable[[], object], within: float = 30.0) -> None:
        deadline = time.monotonic() + within
        while not ready():
            assert time.monotonic() < deadline, (self.log.lines, self.keeper.last_words)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def kept(lane: int, silent: float = 30.0) -> AsyncIterator[Watched]:
    watched = Watched(lane, silent)
    watched.keeper.start()
    try:
        yield watched
    finally:
        await watched.keeper.aclose()
        await watched.keeper.aclose()
        watched.kit.close()


def running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_good_one_is_up_and_ends_with_its_keeper() -> None:
    async with kept(GOOD) as lane:
        await lane.until(lambda: lane.keeper.up)
        pid = lane.keeper.pid
        assert pid is not None and lane.keeper.report.drops == {"no_route": 1}
        assert lane.keeper.inlet is not None
    assert not running(pid)
    assert (lane.came, lane.went, lane.keeper.restarts) == (1, 1, 0)


async def test_a_killed_one_is_replaced() -> None:
    async with kept(GOOD) as lane:
        for life in range(1, 4):
            await lane.until(lambda life=life: lane.came == life and lane.keeper.up)
            pid = lane.keeper.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await lane.until(lambda life=life: lane.went == life)
            assert lane.keeper.inlet is None
        await lane.until(lambda: lane.keeper.restarts >= 3)
        assert lane.keeper.last_words == "ended with signal 9"


@pytest.mark.parametrize("kind", [SILENT, STOPPED, MUTE])
async def test_a_stuck_one_is_killed_and_replaced(kind: int) -> None:
    """MUTE has closed its end of the socket pair, which says that it ends, and goes on."""
    async with kept(kind, silent=1.0) as lane:
        await lane.until(lambda: lane.came >= 2)
        assert lane.went >= 1 and "lane is killed" in lane.log.lines


async def test_one_that_talks_nonsense_is_killed() -> None:
    async with kept(NONSENSE) as lane:
        await lane.until(lambda: lane.keeper.restarts >= 1)
        assert (lane.came, lane.keeper.up) == (0, False)


async def test_one_that_dies_at_once_says_why_and_is_tried_ever_less_often() -> None:
    async with kept(DYING) as lane:
        await lane.until(lambda: lane.keeper.restarts >= 2)
        assert lane.keeper.last_words == "ended with exit code 1: the fuse has blown"
        assert lane.came == 0


async def test_one_that_does_not_listen_is_killed_before_it_misses_a_word() -> None:
    async with kept(DEAF) as lane:
        await lane.until(lambda: lane.keeper.up)
        pid, said = lane.keeper.pid, 0
        while lane.keeper.up:
            lane.keeper.tell(Endpoint("bob" * 1000, BOB))
            said += 1
            assert said < 100_000, "a way without an end"
        await lane.until(lambda: pid is not None and not running(pid))
        lane.keeper.tell(Endpoint("bob", BOB))  # to nobody
