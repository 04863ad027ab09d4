"""A slow model of segmentation: superpackets built and cut one packet at a time, every checksum from scratch.

Nothing here is shared with the code under test.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, replace

TCP, UDP = 6, 17
FIN, PSH, ACK, ECE, CWR = 0x01, 0x08, 0x10, 0x40, 0x80


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Big:
    """One superpacket, as fields."""

    source: str
    destination: str
    payload: bytes
    segment: int
    protocol: int = TCP
    flags: int = ACK | PSH
    sequence: int = 0xFFFF_FF00
    tcp_options: bytes = b""
    ip_options: bytes = b""
    """IPv4 options, or IPv6 extension headers (hop-by-hop only)."""
    identification: int = 0xFFFE
    traffic_class: int = 0
    dont_fragment: bool = False
    source_port: int = 4000

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.source).version

    def transport(self, check: int) -> bytes:
        if self.protocol == UDP:
            return struct.pack(">HHHH", self.source_port, 5000, 8 + len(self.payload), check)
        offset = (20 + len(self.tcp_options)) // 4 << 4
        head = struct.pack(">HHIIBBHHH", self.source_port, 5000, self.sequence, 77, offset, self.flags, 500, check, 0)
        return head + self.tcp_options

    def pseudo(self, length: int) -> bytes:
        ends = ipaddress.ip_address(self.source).packed + ipaddress.ip_address(self.destination).packed
        return (
            ends
            + (struct.pack(">BBH", 0, self.protocol, length) if self.version == 4 else b"")
            + (struct.pack(">IHBB", length, 0, 0, self.protocol) if self.version == 6 else b"")
        )

    def ip_header(self, length: int) -> bytes:
        ends = ipaddress.ip_address(self.source).packed + ipaddress.ip_address(self.destination).packed
        if self.version == 6:
            following = 0 if self.ip_options else self.protocol
            extension = bytes([self.protocol]) + self.ip_options[1:] if self.ip_options else b""
            first = 6 << 28 | self.traffic_class << 20
            return struct.pack(">IHBB", first, len(extension) + length, following, 64) + ends + extension
        size = 20 + len(self.ip_options)
        fragment = 0x4000 * self.dont_fragment
        fields = (
            0x40 | size // 4,
            self.traffic_class,
            size + length,
            self.identification,
            fragment,
            64,
            self.protocol,
        )
        head = struct.pack(">BBHHHBB", *fields)
        check = checksum(head + b"\0\0" + ends + self.ip_options)
        return head + struct.pack(">H", check) + ends + self.ip_options

    def virtio(self) -> bytes:
        """As a TUN gives it: partial checksum, lengths of the whole."""
        head = len(self.ip_header(0))
        transport = self.transport(0)
        kind = 5 if self.protocol == UDP else {4: 1, 6: 4}[self.version]
        if self.protocol == TCP and self.flags & CWR:
            kind |= 0x80
        start = struct.pack(
            "<BBHHHH", 1, kind, head + len(transport), self.segment, head, 6 if self.protocol == UDP else 16
        )
        length = len(transport) + len(self.payload)
        partial = ~checksum(self.pseudo(length)) & 0xFFFF
        return start + self.ip_header(length) + self.transport(partial) + self.payload

    def packet(self) -> bytes:
        """As one finished IP packet, with its checksum."""
        length = len(self.transport(0)) + len(self.payload)
        check = checksum(self.pseudo(length) + self.transport(0) + self.payload)
        return self.ip_header(length) + self.transport(check) + self.payload

    def segments(self) -> list[bytes]:
        """Finished IP packets, as a sender without offload would have sent them."""
        cuts = range(0, len(self.payload), self.segment)
        made = []
        for number, cut in enumerate(cuts):
            flags = self.flags
            if cut + self.segment < len(self.payload):
                flags &= ~(FIN | PSH)
            if number:
                flags &= ~CWR
            one = replace(
                self,
                payload=self.payload[cut : cut + self.segment],
                flags=flags,
                sequence=(self.sequence + cut) & 0xFFFF_FFFF,
                identification=(self.identification + number) & 0xFFFF,
            )
            made.append(one.packet())
        return made


def finish(packet: bytes) -> list[bytes]:
    """What a kernel makes of ``virtio header + packet``: finished IP packets, cut where it must be.

    Reads every field from the bytes, so whatever is wrong in them shows.
    """
    flags, kind, _, segment, start, _ = struct.unpack_from("<BBHHHH", packet)
    data = packet[10:]
    if not flags & 1:
        assert kind == 0
        return [data]
    big = _parse(data, start, segment if kind else len(data))
    partial_at = start + (6 if big.protocol == UDP else 16)
    length = len(data) - start
    expected = ~checksum(big.pseudo(length)) & 0xFFFF
    found = int.from_bytes(data[partial_at : partial_at + 2], "big")
    assert found % 0xFFFF == expected % 0xFFFF, "the partial checksum is not the pseudo-header's sum"
    if big.version == 4:
        assert checksum(data[: (data[0] & 15) * 4]) == 0
    assert bool(kind & 0x80) <= bool(big.flags & CWR)
    return big.segments()


def _parse(data: bytes, start: int, segment: int) -> Big:
    version = data[0] >> 4
    if version == 4:
        source, destination, options = data[12:16], data[16:20], data[20:start]
        atomic = bool(data[6] & 0x40)
        protocol, identification, tos = data[9], int.from_bytes(data[4:6], "big"), data[1]
        assert int.from_bytes(data[2:4], "big") == len(data)
    else:
        source, destination, options = data[8:24], data[24:40], data[40:start]
        protocol = options[0] if options else data[6]
        atomic = False
        identification, tos = 0, int.from_bytes(data[:4], "big") >> 20 & 0xFF
        assert int.from_bytes(data[4:6], "big") == len(data) - 40
    ends = str(ipaddress.ip_address(source)), str(ipaddress.ip_address(destination))
    common = {"ip_options": options, "identification": identification, "traffic_class": tos, "segment": segment}
    common["dont_fragment"] = atomic
    if protocol == UDP:
        assert int.from_bytes(data[start + 4 : start + 6], "big") == len(data) - start
        return Big(*ends, data[start + 8 :], protocol=UDP, **common)
    size = (data[start + 12] >> 4) * 4
    return Big(
        *ends,
        data[start + size :],
        flags=data[start + 13],
        sequence=int.from_bytes(data[start + 4 : start + 8], "big"),
        tcp_options=data[start + 20 : start + size],
        **common,
    )


def reassemble(packets: list[bytes]) -> list[bytes]:
    """Join IPv4 fragments that arrive in order (RFC 791, 3.2, the slow way); all else stays as it is."""
    whole: list[bytes] = []
    head, parts, length = b"", b"", 0
    for packet in packets:
        field = int.from_bytes(packet[6:8], "big") if packet[0] >> 4 == 4 else 0
        if not field & 0x3FFF:
            whole.append(packet)
            continue
        size = (packet[0] & 15) * 4
        assert checksum(packet[:size]) == 0
        if not field & 0x1FFF:
            head, parts = packet[:size], b""
        assert (field & 0x1FFF) * 8 == len(parts) and packet[4:6] == head[4:6] and packet[12:20] == head[12:20]
        parts += packet[size:]
        if not field & 0x2000:
            length = len(head) + len(parts)
            bare = bytearray(head[:2] + length.to_bytes(2, "big") + head[4:6] + bytes(2))
            bare += head[8:10] + bytes(2) + head[12:]
            bare[10:12] = checksum(bytes(bare)).to_bytes(2, "big")
            whole.append(bytes(bare) + parts)
    return whole
