"""The process of one lane: its event loop, its descriptors, its end.

It ends when the daemon closes the socket pair, says something that cannot be meant, or is gone.  It answers to
nobody else: no signal but SIGTERM, no file, no environment.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket

from qvpn import privileged
from qvpn.dataplane import collector
from qvpn.dataplane.loop import PacketLoop
from qvpn.errors import BadPacket
from qvpn.lanes.messages import MAX_MESSAGE, Setup, decode, encode
from qvpn.lanes.relay import RelayOutlet
from qvpn.lanes.traffic import LaneTrafficPath
from qvpn.netio.base import Address
from qvpn.netio.errors import NetioError
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import UdpBind

REPORT_INTERVAL = 1.0


class LaneProcess:
    """Moves messages between the daemon and the lane's traffic."""

    def __init__(self, control: socket.socket, path: LaneTrafficPath) -> None:
        self._control = control
        self._path = path
        self._buffer = memoryview(bytearray(MAX_MESSAGE))
        self._over: asyncio.Future[str] | None = None
        self._timer: asyncio.Handle | None = None

    async def run(self) -> str:
        """Until the end; returns why, empty where the daemon wanted it."""
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        loop.set_exception_handler(lambda _, context: self._end(f"internal error: {_kind(context)}"))
        loop.add_signal_handler(signal.SIGTERM, self._end, "")
        self._path.wake = self._look_soon
        self._path.plane.start()
        self._control.setblocking(False)
        loop.add_reader(self._control, self._on_control)
        self._look()
        collector.settle()
        reports = loop.create_task(self._report_for_ever())
        try:
            return await self._over
        finally:
            reports.cancel()
            loop.remove_reader(self._control)
            if self._timer is not None:
                self._timer.cancel()
            self._path.plane.close()

    def _end(self, why: str) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(why)

    def _on_control(self) -> None:
        while True:
            try:
                length = self._control.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                length = 0
            if not length:
                self._end("")
                return
            try:
                self._path.obey(decode(self._buffer[:length]))
            except (BadPacket, KeyError, ValueError) as error:
                self._end(f"the daemon said what cannot be meant ({type(error).__name__})")
                return
            finally:
                self._buffer[:length] = bytes(length)
        self._look()

    def _look(self) -> None:
        """The paths' timers; and what changed is told at once."""
        if self._timer is not None:
            self._timer.cancel()
        delay = self._path.look() - privileged.boottime()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._look)
        if self._path.changed:
            self._report()
        if self._path.tun_gone:
            self._end("the inner device is gone")

    def _look_soon(self) -> None:
        """In the middle of a batch of packets: when that is done."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._look)

    async def _report_for_ever(self) -> None:
        while True:
            self._path.look_back()
            self._report()
            await asyncio.sleep(REPORT_INTERVAL)

    def _report(self) -> None:
        report = self._path.report()
        try:
            self._control.send(encode(report))
        except BlockingIOError:  # the daemon is stopped: the next report has all of it
            self._path.not_told(report)
        except OSError:
            self._end("")


def run(control: int, relay: int, queue: int, port: int) -> None:
    """Serve until the end.  Raises SystemExit with a sentence where that was not the daemon's wish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends us in order
    with socket.socket(fileno=control) as talk, socket.socket(fileno=relay) as outlet:
        listener = socket.socket(fileno=port)
        try:
            setup = decode(talk.recv(MAX_MESSAGE))
        except BadPacket as error:
            raise SystemExit(str(error)) from None
        if not isinstance(setup, Setup):
            raise SystemExit("a lane must be told first what it is")
        try:
            tun = TunDevice(queue)
        except NetioError as error:
            raise SystemExit(str(error)) from None
        bind = UdpBind(_local(listener), listener=listener)
        path = LaneTrafficPath(setup, tun, bind, RelayOutlet(outlet), clock=privileged.boottime, random=os.urandom)
        try:
            with asyncio.Runner(loop_factory=PacketLoop) as runner:
                why = runner.run(LaneProcess(talk, path).run())
        finally:
            bind.close()
            tun.close()
    if why:
        raise SystemExit(why)


def _local(listener: socket.socket) -> Address:
    host, port = listener.getsockname()[:2]
    return Address(ipaddress.ip_address(host.partition("%")[0]), port)


def _kind(context: dict[str, object]) -> str:
    return type(context.get("exception")).__name__
