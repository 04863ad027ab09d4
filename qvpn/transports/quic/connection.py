"""aioquic's connection with limits to what one packet may ask for, and a short way for packets of DATAGRAM frames.

:class:`Connection` is a :class:`QuicConnection` in which

- a packet has at most so many frames, an ACK frame so many ranges, the TLS handshake so many bytes, and streams none;
  more ends the connection.  Without that, one datagram of frames of one byte costs its receiver milliseconds;
- acknowledgements that were sent and that nobody acknowledges are forgotten after a while;
- packets with a short header on the path in use are opened by :meth:`receive_datagram` itself, and packets that
  have nothing but DATAGRAM frames are built by :meth:`seal`.  They are the same packets (RFC 9000, 17.3.1; RFC 9221),
  under aioquic's own keys, numbers and books, for a fraction of its work.  Whatever is unusual (another path, another
  connection ID, a key update, anything but datagrams to send) goes aioquic's way.

aioquic's insides that are used here and in :mod:`~qvpn.transports.quic.link` are those of the versions that
``pyproject.toml`` allows; the tests check what is relied on.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Protocol, cast

from aioquic._crypto import CryptoError
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType, decode_packet_number
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.tls import Epoch

from qvpn.netio.base import Address
from qvpn.transports.quic.acceptor import CID
from qvpn.transports.quic.packets import Packet

FRAMES, LEAST_FRAME = 32, 32
"""A packet has at most so many frames, and one more for so many bytes: no datagram of ours makes a shorter one."""

RANGES = 128
"""Of an ACK frame; aioquic remembers half as many."""

CRYPTO_BYTES = 1 << 16
"""Of TLS in each of its stages: certificates take some thousand."""

ACKNOWLEDGEMENTS = 64
"""Packets without anything that is acknowledged by itself, of which we remember that we sent them."""

SENT_FRAMES = 16
"""Datagrams that share a packet at the most."""

FRAME = 3
"""Bytes before the datagram in its frame: type, and length in two bytes (RFC 9221, 4; RFC 9000, 16)."""
_SHORT_LENGTH = 0x4000

SHORT, SPIN, PHASE, RESERVED = 0x40, 0x20, 0x04, 0x18
"""First byte of a packet with a short header (RFC 9000, 17.3.1)."""
NUMBER_BYTES, SAMPLE_AT, TAG = 2, 4, 16
"""Of the packet number as we write it; where the sample begins behind its place (RFC 9001, 5.4.2); of the AEAD."""

ONE_RTT, CONNECTED, SHORT_HEADER = Epoch.ONE_RTT, QuicConnectionState.CONNECTED, QuicPacketType.ONE_RTT
DATAGRAM = int(QuicFrameType.DATAGRAM_WITH_LENGTH)

IDLE_STEP = 0.25
"""Seconds by which the idle timeout may be early: it is not worked out anew for each packet."""

# Strangers' mistakes are counted, not logged one by one.
logging.getLogger("quic").addHandler(logging.NullHandler())
logging.getLogger("quic").propagate = False


class Waiting(Protocol):
    """Datagrams that wait to be sent (:class:`~qvpn.transports.quic.queue.DatagramQueue`)."""

    def __bool__(self) -> bool: ...

    def __getitem__(self, place: int) -> bytes: ...

    def popleft(self) -> bytes: ...


class _Metered(dict[int, Any]):
    """aioquic's table of frame handlers, which is asked once for each frame."""

    left = 0
    """Frames that this packet may still have."""

    def __getitem__(self, kind: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _excessive(kind, "too many frames")
        return super().__getitem__(kind)


def _excessive(kind: int, what: str) -> QuicConnectionError:
    return QuicConnectionError(error_code=QuicErrorCode.PROTOCOL_VIOLATION, frame_type=kind, reason_phrase=what)


class Connection(QuicConnection):
    """One connection.  What arrives in DATAGRAM frames is in :attr:`datagrams`, not among the events."""

    def __init__(self, configuration: QuicConfiguration, counts: Counter[str], **more: Any) -> None:
        """``counts`` gets ``excess`` and ``protocol_errors``.  ``more``: as for :class:`QuicConnection`."""
        super().__init__(configuration=configuration, **more)
        self.datagrams: list[bytes] = []
        """What came in, for whoever takes it away."""
        self.verified = 0
        """Packets that verified, and so came from the other end; at least one for each datagram that brought any."""
        self._counts = counts
        self._idle_from = float("-inf")
        inside = cast(Any, self)
        self._frames = _Metered(inside._QuicConnection__frame_handlers)
        inside._QuicConnection__frame_handlers = self._frames
        for limit in (self._local_max_streams_bidi, self._local_max_streams_uni):
            limit.value = limit.sent = 0

    @property
    def closing(self) -> bool:
        """One of the ends has closed it."""
        return self._close_event is not None

    @property
    def eventful(self) -> bool:
        """There is something in :meth:`next_event`."""
        return bool(self._events)

    # limits

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self._frames.left = FRAMES + len(plain) // LEAST_FRAME
        try:
            return super()._payload_received(context, plain, crypto_frame_required)
        except QuicConnectionError:
            self._counts["excess" if self._frames.left < 0 else "protocol_errors"] += 1
            raise

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        start = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        if end > CRYPTO_BYTES:
            self._frames.left = -1
            raise _excessive(frame_type, "too long a handshake")
        buf.seek(start)
        super()._handle_crypto_frame(context, frame_type, buf)

    def _handle_ack_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        start = buf.tell()
        buf.pull_uint_var()
        buf.pull_uint_var()
        if buf.pull_uint_var() > RANGES:
            self._frames.left = -1
            raise _excessive(frame_type, "too many ranges")
        buf.seek(start)
        super()._handle_ack_frame(context, frame_type, buf)

    def _handle_datagram_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        if frame_type == DATAGRAM:
            self.datagrams.append(buf.pull_bytes(buf.pull_uint_var()))
        else:
            self.datagrams.append(buf.pull_bytes(buf.capacity - buf.tell()))

    # receiving

    def receive_datagram(self, data: bytes, addr: Address, now: float) -> None:
        """One UDP datagram from there."""
        if not self._receive_short(data, addr, now):
            before = self._close_at
            super().receive_datagram(data, addr, now)
            if self._close_at is not before:  # a packet verified, for the idle timeout starts anew then
                self.verified += 1
                self._idle_from = now

    def _receive_short(self, data: bytes, addr: Address, now: float) -> bool:
        """A packet with a short header, on the path and under the connection ID and keys in use.

        False, and nothing done, for all else.
        """
        if len(data) < 1 + CID + SAMPLE_AT + TAG or data[0] & 0xC0 != SHORT or data[1 : 1 + CID] != self.host_cid:
            return False
        if not self._handshake_confirmed or self._state is not CONNECTED or self._close_pending:
            return False
        path = self._network_paths[0]
        if not path.is_validated:
            return False
        if path.addr is not addr:
            if path.addr != addr:
                return False
            path.addr = addr  # quicker to tell the next time
        keys = cast(Any, self._cryptos[ONE_RTT].recv)
        space = self._spaces[ONE_RTT]
        mask = keys.hp._mask(data[1 + CID + SAMPLE_AT : 1 + CID + SAMPLE_AT + TAG])
        first = data[0] ^ (mask[0] & 0x1F)
        if first & RESERVED or bool(first & PHASE) != bool(keys.key_phase):
            return False
        size = (first & 3) + 1
        end = 1 + CID + size
        written = int.from_bytes(data[1 + CID : end]) ^ int.from_bytes(mask[1 : 1 + size])
        number = decode_packet_number(written, 8 * size, space.expected_packet_number)
        header = bytes((first,)) + data[1 : 1 + CID] + written.to_bytes(size)
        try:
            plain = keys.aead.decrypt(data[end:], header, number)
        except CryptoError:
            return True
        if number in space.received_packets:
            return True
        self.verified += 1
        if number > space.expected_packet_number:
            space.expected_packet_number = number + 1
        if number > self._spin_highest_pn:
            self._spin_bit, self._spin_highest_pn = bool(first & SPIN) != self._is_client, number
        self._received(space, plain, number, now)
        return True

    def _received(self, space: QuicPacketSpace, plain: bytes, number: int, now: float) -> None:
        """The frames of a packet that verified, and what aioquic's books say of it (RFC 9000, 13.2)."""
        found, eliciting = datagrams_in(plain), True
        if found is not None:
            self.datagrams += found
        else:
            eliciting = self._handle_frames(plain, now)
            if self._state is not CONNECTED or self._close_pending:
                return
        if not self._idle_from <= now < self._idle_from + IDLE_STEP:
            self._close_at, self._idle_from = now + self._idle_timeout(), now
        self._ack_eliciting_sent_since_receipt = False
        if number > space.largest_received_packet:
            space.largest_received_packet, space.largest_received_time = number, now
        space.ack_queue.add(number)
        space.received_packets.add(number)
        if len(space.ack_queue) > MAX_ACK_RANGES:
            space.ack_queue.shift()
        if eliciting and space.ack_at is None:
            space.ack_at = now + self._ack_delay

    def _handle_frames(self, plain: bytes, now: float) -> bool:
        """All kinds of frames; True if they are to be acknowledged.  What is wrong closes the connection."""
        path = self._network_paths[0]
        context = QuicReceiveContext(ONE_RTT, self.host_cid, path, None, now, None)
        try:
            return self._payload_received(context, plain)[0]
        except QuicConnectionError as error:
            self.close(error.error_code, error.frame_type, error.reason_phrase)
            return False

    # sending

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        found = super().datagrams_to_send(now)
        self._forget_acknowledgements()
        return found

    def _forget_acknowledgements(self) -> None:
        """An end that only receives sends acknowledgements that nobody acknowledges; aioquic keeps them all for ever.

        The oldest may go: nothing is repeated when they are lost, and congestion control has not counted them.
        """
        space = self._spaces.get(ONE_RTT)
        if space is None:
            return
        sent = space.sent_packets
        if len(sent) - space.ack_eliciting_in_flight <= 2 * ACKNOWLEDGEMENTS:
            return
        idle = [number for number, packet in sent.items() if not packet.is_ack_eliciting and not packet.in_flight]
        for number in idle[:-ACKNOWLEDGEMENTS]:
            del sent[number]

    @property
    def only_datagrams(self) -> bool:
        """Nothing but datagrams and acknowledgements wants to be sent, so :meth:`seal` may build the packets."""
        if not self._handshake_confirmed or self._state is not CONNECTED:
            return False
        path, pair = self._network_paths[0], self._cryptos[ONE_RTT]
        if self._close_pending or self._probe_pending or self._ping_pending or self._handshake_done_pending:
            return False
        if self._retire_connection_ids or self._streams or self._streams_queue or pair._update_key_requested:
            return False
        if not path.is_validated or path.remote_challenges or self._remote_preferred_address is not None:
            return False
        if not self._crypto_streams[ONE_RTT].sender.buffer_is_empty:
            return False
        quiet = (
            not each.remote_challenges and (each.is_validated or each.local_challenge_sent)
            for each in self._network_paths[1:]
        )
        return all(each.was_sent for each in self._host_cids) and all(quiet)

    def acknowledges(self, now: float) -> bool:
        """An acknowledgement is due."""
        due = self._spaces[ONE_RTT].ack_at
        return due is not None and due <= now

    def seal(self, waiting: Waiting, most: int, now: float) -> list[Packet]:
        """Packets of at most ``most`` bytes with what waits, as far as congestion control and pacing let it go.

        Only while :attr:`only_datagrams` is true.
        """
        found: list[Packet] = []
        path, pair, space, recovery = (
            self._network_paths[0],
            self._cryptos[ONE_RTT],
            self._spaces[ONE_RTT],
            self._loss,
        )
        keys, control, pacer = cast(Any, pair.send), recovery._cc, recovery._pacer
        cid = self._peer_cid.cid
        first = SHORT | (SPIN if self._spin_bit else 0) | (PHASE if pair.key_phase else 0) | (NUMBER_BYTES - 1)
        start = bytes((first,)) + cid
        overhead = len(start) + NUMBER_BYTES + TAG
        self._pacing_at = None
        while waiting:
            self._pacing_at = pacer.next_send_time(now=now)
            if self._pacing_at is not None:
                break
            count, frames = _frames(
                waiting, min(most, control.congestion_window - control.bytes_in_flight) - overhead
            )
            if not frames:
                break
            number = self._packet_number
            self._packet_number += 1
            written = number & 0xFFFF
            sealed = keys.aead.encrypt(frames, start + written.to_bytes(NUMBER_BYTES), number)
            mask = keys.hp._mask(sealed[SAMPLE_AT - NUMBER_BYTES : SAMPLE_AT - NUMBER_BYTES + TAG])
            hidden = (written ^ (mask[1] << 8 | mask[2])).to_bytes(NUMBER_BYTES)
            packet = b"".join((bytes((first ^ (mask[0] & 0x1F),)), cid, hidden, sealed))
            found.append(Packet(packet, path.addr, count))
            path.bytes_sent += len(packet)
            recovery.on_packet_sent(packet=_sent(number, len(packet), now), space=space)
            pacer.update_after_send(now=now)
        if found and not self._ack_eliciting_sent_since_receipt:
            self._close_at, self._ack_eliciting_sent_since_receipt = now + self._idle_timeout(), True
            self._idle_from = now
        return found


def _sent(number: int, size: int, now: float) -> QuicSentPacket:
    """What loss detection keeps of a packet of DATAGRAM frames: nothing is repeated when it is lost."""
    return QuicSentPacket(
        epoch=ONE_RTT,
        in_flight=True,
        is_ack_eliciting=True,
        is_crypto_packet=False,
        packet_number=number,
        packet_type=SHORT_HEADER,
        sent_time=now,
        sent_bytes=size,
    )


def datagrams_in(plain: bytes) -> list[bytes] | None:
    """The contents of a packet's DATAGRAM frames; None if it has others, or is anything but plain and whole."""
    found: list[bytes] = []
    at, end = 0, len(plain)
    while at < end:
        if plain[at] != DATAGRAM or at + FRAME > end:
            return None
        length, start = plain[at + 1], at + 2
        if length >= 0x40:
            if length >= 0x80:
                return None
            length, start = (length & 0x3F) << 8 | plain[start], start + 1
        at = start + length
        found.append(plain[start:at])
    return found if at == end and 0 < len(found) <= FRAMES + end // LEAST_FRAME else None


def _frames(waiting: Waiting, room: int) -> tuple[int, bytes]:
    """Take as many datagrams as fit into so many bytes; how many, and their frames."""
    parts: list[bytes] = []
    while waiting and len(parts) < 2 * SENT_FRAMES:
        datagram = waiting[0]
        room -= FRAME + len(datagram)
        if room < 0:
            break
        parts += (b"\x31" + (_SHORT_LENGTH | len(datagram)).to_bytes(2), datagram)
        waiting.popleft()
    return len(parts) // 2, b"".join(parts)
