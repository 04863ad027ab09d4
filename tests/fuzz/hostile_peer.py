"""A peer with good keys and bad intentions: records whose plaintexts lie in every field."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import strategies as st

from qvpn.tunnel.keys import EpochKeys
from tests.property.dataplane_traffic import other_packets, plain_transport, superpackets
from tests.property.kernel_model import transport_of

FLAGS = [0, 1, 1, 1, 2, 3, 4, 5, 0x80, 255]
TYPES = [0, 1, 2, 3, 4, 5, 6, 0x80, 0x81, 0x83, 0x84, 0x85, 255]
WORDS = [0, 1, 7, 8, 19, 20, 21, 28, 39, 40, 41, 60, 64, 512, 1400, 1480, 0x7FFF, 0xFFF5, 0xFFFE, 0xFFFF]
FLAGS_OF_TCP = [0x02, 0x12, 0x04, 0x14, 0xFF, 0x00]

Lie = tuple[int, bytes]
"""Offset in the frame and the bytes put there."""


@dataclass(frozen=True)
class Delivery:
    """Plaintexts and the counters they are sealed under, in order of arrival."""

    records: tuple[tuple[int, bytes], ...]


def _byte(values: list[int]) -> st.SearchStrategy[bytes]:
    return st.sampled_from(values).map(lambda value: bytes([value]))


@st.composite
def lies(draw: st.DrawFn, frame: bytes) -> Lie:
    """One field set to something interesting."""
    _, at = transport_of(frame[10:])
    word = draw(st.sampled_from(WORDS) | st.integers(0, 0xFFFF) | st.just(len(frame) - 10))
    near = draw(st.integers(-2, 2))
    fields: list[tuple[int, bytes]] = [
        (0, draw(_byte(FLAGS))),
        (1, draw(_byte(TYPES))),
        *((place, struct.pack("<H", word)) for place in (2, 4, 6, 8)),
        (6, struct.pack("<H", (at + near) & 0xFFFF)),
        (10, draw(_byte([0x00, 0x44, 0x45, 0x46, 0x4F, 0x55, 0x60, 0x6F]))),
        (12, struct.pack(">H", word)),
        (14, struct.pack(">H", (len(frame) - 50 + near) & 0xFFFF)),
        (16, draw(_byte([0x00, 0x20, 0x1F, 0x40, 0x80, 0x2C, 0x06, 0x11]))),
        (19, draw(_byte([0, 1, 6, 17, 43, 44, 60, 132]))),
        (22, draw(st.binary(min_size=4, max_size=4))),
        (10 + at + 4, struct.pack(">H", word)),
        (10 + at + 12, draw(_byte([0x00, 0x40, 0x50, 0x60, 0xF0]))),
        (10 + at + 13, draw(_byte(FLAGS_OF_TCP))),
        (draw(st.integers(0, min(len(frame) - 1, 120))), draw(st.binary(min_size=1, max_size=2))),
    ]
    return draw(st.sampled_from(fields))


def told(frame: bytes, lie: Lie) -> bytes:
    place, value = lie
    return frame[:place] + value + frame[place + len(value) :] if place < len(frame) else frame


@st.composite
def lying_chunks(draw: st.DrawFn) -> Delivery:
    """A superpacket cut at its true header, with lies in the header of some or of all chunks."""
    frame = draw(superpackets(most=12, room=900))
    head, step = _head(frame), max(1, struct.unpack_from("<H", frame, 4)[0])
    slices = [frame[head + cut : head + cut + step] for cut in range(0, len(frame) - head, step)]
    chunks = [frame[:head] + part for part in slices]
    everywhere = [draw(lies(frame)) for _ in range(draw(st.integers(0, 2)))]
    for lie in everywhere:
        chunks = [told(chunk, lie) for chunk in chunks]
    for _ in range(draw(st.integers(0, 2))):
        victim = draw(st.integers(0, len(chunks) - 1))
        chunks[victim] = told(chunks[victim], draw(lies(frame)))
    if draw(st.integers(0, 3)) == 0:
        victim = draw(st.integers(0, len(chunks) - 1))
        chunks[victim] = draw(st.sampled_from([chunks[victim][:-1], chunks[victim] + b"\0", frame[:head], b""]))
    shift = draw(st.sampled_from([0, 0, 0, 1, 63, 64 - len(chunks)]))
    records = [(max(0, shift) + place, chunk) for place, chunk in enumerate(chunks)]
    if draw(st.integers(0, 3)) == 0:
        records = draw(st.permutations(records))
    return Delivery(tuple(records))


@st.composite
def lying_packets(draw: st.DrawFn) -> Delivery:
    """Records of several packets, with lies and rubbish among them."""
    records = []
    for counter in range(draw(st.integers(1, 4))):
        frames = draw(st.lists(plain_transport() | other_packets(), min_size=1, max_size=3))
        frames = [told(frame, draw(lies(frame))) if draw(st.booleans()) else frame for frame in frames]
        records.append((counter, b"".join(frames) + draw(st.just(b"") | st.binary(max_size=40))))
    return Delivery(tuple(records))


deliveries = lying_chunks() | lying_chunks() | lying_packets()


def _head(frame: bytes) -> int:
    protocol, at = transport_of(frame[10:])
    return 10 + at + (8 if protocol == 17 else (frame[10 + at + 12] >> 4) * 4)


def sealed(delivery: Delivery, keys: EpochKeys, block: int) -> list[bytes]:
    """The records under counters of this block."""
    aead, made = AESGCM(keys.send_key(0)), []
    for place, plaintext in delivery.records:
        nonce = keys.send_index.to_bytes(4, "big") + (block * 64 + place).to_bytes(8, "little")
        made.append(b"\x10\x01\0\0" + nonce + aead.encrypt(nonce, plaintext, None))
    return made
