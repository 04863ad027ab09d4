"""Listen on an interface and search every frame for plaintext: ``python -m qvpn.demo.capture --interface wan ...``.

AF_PACKET sees frames as the kernel hands them over, superpackets of 60 KB included, so the buffer holds 65 KB and
a frame longer than it is counted.  The process prints running counts as JSON lines and its result on SIGTERM.
A capture is worth something only beside its control: the same search on the TUN side must find the pattern.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import socket
import struct
import sys
import time
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from types import FrameType
from typing import Any

_BUFFER_BYTES = 1 << 16
_SLACK = 128
_QUEUE_BYTES = 64 << 20
_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_IPV4, _IPV6, _UDP = 0x0800, 0x86DD, 17
_RECORD = 0x10
_HANDSHAKE = {1: "M1", 2: "M2", 3: "M3", 4: "M4", 5: "RETRY", 6: "M3R"}
_RETRY = 5
"""First byte of a record and of the handshake datagrams (qvpn/handshake/PROTOCOL.md, chapter 3)."""
_QUIC_BIT = 0x40
"""Set in the first byte of every QUIC packet, and in no other datagram of the tunnel."""

_stopping = False


class Tally:
    """Counts over frames; sans-IO, so that the search itself can be tested."""

    def __init__(
        self, marker: bytes, *, inner: list[IPv4Network | IPv6Network] | None = None, port: int | None = None
    ) -> None:
        self._marker = marker
        self._inner = inner or []
        self._port = port
        self.frames = 0
        self.bytes = 0
        self.largest = 0
        self.truncated = 0
        self.with_plaintext = 0
        self.with_inner_address = 0
        self.records = 0
        self.quic = 0
        self.handshake: dict[str, int] = {}
        self.suites: set[int] = set()
        self.last_record_at: float | None = None
        self.last_plaintext_at: float | None = None

    def note_untrusted(self, buffer: bytearray, length: int, *, ethernet: bool, now: float) -> None:
        """Count one frame: ``length`` is its real length, ``buffer`` holds as much of it as fits."""
        held = min(length, len(buffer))
        self.frames += 1
        self.bytes += length
        self.largest = max(self.largest, length)
        self.truncated += length > held
        if buffer.find(self._marker, 0, held) >= 0:
            self.with_plaintext += 1
            self.last_plaintext_at = now
        self._note_addresses(memoryview(buffer)[:held], ethernet, now)

    def _note_addresses(self, frame: memoryview, ethernet: bool, now: float) -> None:
        if ethernet:
            if len(frame) < 14:
                return
            frame = frame[14:]
        if len(frame) >= 20 and frame[0] >> 4 == 4:
            ends, transport, offset = (frame[12:16], frame[16:20]), frame[9], (frame[0] & 15) * 4
        elif len(frame) >= 40 and frame[0] >> 4 == 6:
            ends, transport, offset = (frame[8:24], frame[24:40]), frame[6], 40
        else:
            return
        if self._inner and any(ip_address(bytes(end)) in net for end in ends for net in self._inner):
            self.with_inner_address += 1
        if transport == _UDP and len(frame) > offset + 8:
            ports = struct.unpack_from(">HH", frame, offset)
            if self._port in ports:
                self._note_tunnel(frame[offset + 8 :], now)

    def _note_tunnel(self, datagram: memoryview, now: float) -> None:
        """Handshakes inside an epoch travel in records; only those outside any epoch show themselves here."""
        if datagram[0] == _RECORD:
            self.records += 1
            self.last_record_at = now
        elif datagram[0] & _QUIC_BIT:
            self.quic += 1
        elif name := _HANDSHAKE.get(datagram[0]):
            self.handshake[name] = self.handshake.get(name, 0) + 1
            if len(datagram) > 2 and datagram[0] != _RETRY:
                self.suites.add(datagram[2])

    def result(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "bytes": self.bytes,
            "largest_frame": self.largest,
            "truncated": self.truncated,
            "frames_with_plaintext": self.with_plaintext,
            "frames_with_inner_address": self.with_inner_address,
            "tunnel_records": self.records,
            "quic_packets": self.quic,
            "handshake_datagrams": self.handshake,
            "suites": sorted(self.suites),
            "last_record_at": self.last_record_at,
            "last_plaintext_at": self.last_plaintext_at,
        }


class Listener:
    """A packet socket on one interface."""

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE_BYTES)
        self.socket.bind((interface, 0))
        self.socket.setblocking(False)
        self.ethernet = self.socket.getsockname()[3] in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)
        self.unseen = 0

    def drain_into(self, tally: Tally, buffer: bytearray) -> None:
        """Count what is queued, at most a thousand frames so that signals and reports get their turn."""
        for _ in range(1000):
            try:
                length = self.socket.recv_into(buffer, 0, socket.MSG_TRUNC)
            except BlockingIOError:
                return
            except OSError:
                return  # the interface went down; it may come back
            tally.note_untrusted(buffer, length, ethernet=self.ethernet, now=time.monotonic())

    def lost(self) -> int:
        """Frames that the kernel could not queue for us so far (reading the counter resets it)."""
        raw = self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self.unseen += struct.unpack("II", raw)[1]
        return self.unseen


def _emit(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _stop(_signum: int, _frame: FrameType | None) -> None:
    global _stopping
    _stopping = True


def _listen(listener: Listener, tally: Tally, report: float) -> None:
    buffer = bytearray(_BUFFER_BYTES + _SLACK)
    next_report = time.monotonic() + report
    while not _stopping:
        select.select([listener.socket], [], [], 0.1)
        listener.drain_into(tally, buffer)
        if (now := time.monotonic()) >= next_report:
            _emit({"at": now, **tally.result(), "unseen": listener.lost()})
            next_report = now + report
    listener.drain_into(tally, buffer)


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(prog="qvpn.demo.capture")
    parser.add_argument("--interface", required=True)
    parser.add_argument("--marker", type=bytes.fromhex, required=True)
    parser.add_argument("--inner", type=ip_network, action="append", help="network that belongs inside the tunnel")
    parser.add_argument("--port", type=int, help="UDP port of the tunnel, to count its records")
    parser.add_argument("--report", type=float, default=0.25, help="seconds between two lines of counts")
    chosen = parser.parse_args()
    try:
        listener = Listener(chosen.interface)
    except OSError as error:
        sys.exit(f"capture: cannot listen on {chosen.interface}: {error.strerror}")
    tally = Tally(chosen.marker, inner=chosen.inner, port=chosen.port)
    _emit({"ready": True, "at": time.monotonic()})
    _listen(listener, tally, chosen.report)
    _emit({"at": time.monotonic(), **tally.result(), "unseen": listener.lost()})


if __name__ == "__main__":
    main()
