"""The loop that moves packets inside its wait: nothing of asyncio may notice, but that it has less to do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from qvpn.dataplane.loop import PacketLoop, add_reader, remove_reader
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, epoch_pair, numbered
from tests.unit.dataplane.test_plane_loop import LoopSite

LIMIT = 10.0
"""Seconds after which a wait that should have ended has failed."""


def run(main: Callable[[PacketLoop], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, PacketLoop)
        await asyncio.wait_for(main(loop), LIMIT)

    with asyncio.Runner(loop_factory=PacketLoop) as runner:
        runner.run(bounded())


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


Pair = tuple[socket.socket, socket.socket]


def test_what_a_packet_makes_ready_runs_at_once(pair: Pair) -> None:
    """A future that a reader sets wakes its task although no timer is due and no other descriptor is ready."""
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        came = loop.create_future()
        loop.add_packet_reader(ours.fileno(), lambda fd: came.set_result(os.read(fd, 9)))
        theirs.send(b"packet")
        assert await came == b"packet"

    run(main)


def test_a_timer_that_a_packet_sets_is_not_late(pair: Pair) -> None:
    """The wait was for a later one."""
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        done = asyncio.Event()

        def read(fd: int) -> None:
            os.read(fd, 9)
            loop.call_later(0.01, done.set)

        loop.add_packet_reader(ours.fileno(), read)
        loop.call_later(60.0, print)
        theirs.send(b"x")
        await done.wait()

    run(main)


def test_packets_without_end_delay_neither_timers_nor_descriptors_nor_threads_nor_signals(pair: Pair) -> None:
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        seen: set[str] = set()
        everything = asyncio.Event()

        def note(what: str) -> None:
            seen.add(what)
            if len(seen) == 4:
                everything.set()

        loop.add_packet_reader(ours.fileno(), lambda _: None)  # never reads: ready for ever
        theirs.send(b"x")
        loop.call_later(0.01, note, "timer")
        loop.add_signal_handler(signal.SIGUSR1, note, "signal")
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(note, "thread"))
        reader, writer = os.pipe()
        loop.add_reader(reader, note, "descriptor")
        os.write(writer, b"x")
        thread.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        await everything.wait()
        thread.join()
        loop.remove_reader(reader)
        loop.remove_signal_handler(signal.SIGUSR1)
        os.close(reader)
        os.close(writer)

    run(main)


def test_tasks_that_are_always_ready_do_not_keep_packets_out(pair: Pair) -> None:
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        got: list[bytes] = []
        loop.add_packet_reader(ours.fileno(), lambda fd: got.append(os.read(fd, 9)))
        theirs.send(b"x")
        while not got:
            await asyncio.sleep(0)

    run(main)


def test_a_reader_that_fails_is_told_of_and_the_loop_goes_on(pair: Pair) -> None:
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))

        def fail(fd: int) -> None:
            os.read(fd, 9)
            raise RuntimeError("broken")

        loop.add_packet_reader(ours.fileno(), fail)
        for number in (1, 2):
            theirs.send(b"x")
            while len(told) < number:
                await asyncio.sleep(0.001)
        assert [str(context["exception"]) for context in told] == ["broken", "broken"]

    run(main)


def test_a_reader_that_is_removed_is_not_called_and_its_number_is_free(pair: Pair) -> None:
    ours, theirs = pair

    async def main(loop: PacketLoop) -> None:
        calls: list[int] = []
        add_reader(loop, ours.fileno(), calls.append)
        with pytest.raises(ValueError, match="has a packet reader"):
            loop.add_packet_reader(ours.fileno(), calls.append)
        remove_reader(loop, ours.fileno())
        assert not loop.remove_packet_reader(ours.fileno())
        theirs.send(b"x")
        await asyncio.sleep(0.01)
        assert calls == []
        again = loop.create_future()
        add_reader(loop, ours.fileno(), lambda fd: again.set_result(os.read(fd, 9)))
        assert await again == b"x"

    run(main)


def test_a_reader_may_remove_the_one_that_is_ready_with_it() -> None:
    """As when a failed send closes a socket that has datagrams waiting."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]

    async def main(loop: PacketLoop) -> None:
        calls: list[int] = []
        own = {ends[0].fileno() for ends in pairs}

        def read(fd: int) -> None:
            calls.append(fd)
            os.read(fd, 9)
            for other in own - {fd}:
                loop.remove_packet_reader(other)

        for fd in own:
            loop.add_packet_reader(fd, read)
        for _, theirs in pairs:
            theirs.send(b"x")
        await asyncio.sleep(0.01)
        assert len(calls) == 1

    run(main)
    for ends in pairs:
        for end in ends:
            end.close()


def test_packets_pass_without_a_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard for what the loop is made for: 100 packets one by one, and asyncio hears of none."""
    turns = 0

    async def main(loop: PacketLoop) -> None:
        nonlocal turns
        sites = LoopSite("bob", FROM_BOB), LoopSite("alice", FROM_ALICE)
        alice, bob = sites
        alice.plane.set_endpoint("bob", bob.bind.local)
        bob.plane.set_endpoint("alice", alice.bind.local)
        initiator, responder = epoch_pair(1, hard_end=time.monotonic() + 60)
        bob.plane.install("alice", responder)
        alice.plane.install("bob", initiator)
        packets = [numbered(number, FROM_ALICE[4], FROM_BOB[4]) for number in range(101)]

        def kernels(part: list[bytes]) -> list[bytes]:
            """Both sites' kernels, in a thread that may block."""
            got = []
            for packet in part:
                alice.tun.kernel.send(packet)
                got.append(bob.tun.kernel.recv(70_000))
            return got

        bob.tun.kernel.settimeout(LIMIT)
        assert await asyncio.to_thread(kernels, packets[:1]) == packets[:1]  # the first wakes control
        select = loop._packets.select

        def counted(timeout: float | None = None) -> Any:
            nonlocal turns
            turns += 1
            return select(timeout)

        monkeypatch.setattr(loop._packets, "select", counted)
        assert await asyncio.to_thread(kernels, packets[1:]) == packets[1:]
        for site in sites:
            site.close()

    run(main)
    assert turns < 50


def test_what_control_says_is_heard_before_packets_that_wait_with_it(pair: Pair) -> None:
    """A lane that was stopped finds both when it goes on: an order to erase keys, and packets to use them for."""
    ours, theirs = pair
    order: list[bytes] = []

    async def main(loop: PacketLoop) -> None:
        control, daemon = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with control, daemon:
            loop.add_packet_reader(ours.fileno(), lambda fd: order.append(os.read(fd, 9)))
            loop.add_reader(control, lambda: order.append(control.recv(9)))
            theirs.send(b"packet")
            daemon.send(b"erase")
            while len(order) < 2:
                await asyncio.sleep(0.001)
            loop.remove_reader(control)

    run(main)
    assert order == [b"erase", b"packet"]


def test_control_that_never_ends_does_not_starve_packets(pair: Pair) -> None:
    ours, theirs = pair
    order: list[str] = []

    async def main(loop: PacketLoop) -> None:
        control, daemon = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with control, daemon:
            done = loop.create_future()

            def packet(fd: int) -> None:
                order.append("packet")
                os.read(fd, 9)
                if order.count("packet") < 5:
                    theirs.send(b"next")
                elif not done.done():
                    done.set_result(None)

            loop.add_packet_reader(ours.fileno(), packet)
            loop.add_reader(control, lambda: order.append("control"))  # which reads nothing, so it stays ready
            daemon.send(b"for ever")
            theirs.send(b"first")
            await done
            loop.remove_reader(control)

    run(main)
    assert order[0] == "control"
    assert order.count("control") <= 3 * order.count("packet") + 3
