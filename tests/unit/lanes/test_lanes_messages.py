"""What daemon and lane say to each other survives the way, and nothing else does."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.errors import BadPacket
from qvpn.lanes import messages
from qvpn.lanes.messages import (
    COUNTS,
    Endpoint,
    Erase,
    Hold,
    Install,
    LaneTraffic,
    Message,
    PathSize,
    PeerSetup,
    Report,
    Setup,
    Usable,
    decode,
    encode,
)
from qvpn.netio.base import Address
from qvpn.tunnel.keys import Cipher, EpochState

INDEXES = st.integers(0, 0xFFFFFFFF)
NAMES = st.text(max_size=20)
COUNTERS = st.dictionaries(NAMES, st.integers(0, 1 << 62), max_size=3)
NETWORKS = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: ipaddress.ip_network(f"{ip}/32")),
    st.ip_addresses(v=6).map(lambda ip: ipaddress.ip_network(f"{ip}/64", strict=False)),
)
ADDRESSES = st.builds(Address, st.ip_addresses(), st.integers(0, 65_535), st.integers(0, 9))
SECONDS = st.floats(0, 1e9)
KEYS = st.binary(min_size=32, max_size=32)
TRAFFIC = st.builds(
    LaneTraffic,
    up=st.booleans(),
    endpoint=st.none() | NAMES,
    drops=COUNTERS,
    **{name: st.integers(0, 1 << 62) for name in COUNTS},
)
MESSAGES = st.one_of(
    st.builds(
        Setup,
        st.integers(0, 15),
        st.lists(
            st.builds(PeerSetup, NAMES, st.lists(NETWORKS, max_size=3).map(tuple), SECONDS, SECONDS), max_size=3
        ).map(tuple),
    ),
    st.builds(Endpoint, NAMES, st.none() | ADDRESSES),
    st.builds(
        Install,
        NAMES,
        INDEXES,
        INDEXES,
        INDEXES,
        st.sampled_from(Cipher),
        st.sampled_from(EpochState),
        SECONDS,
        st.booleans(),
        KEYS,
        KEYS,
    ),
    st.builds(Usable, NAMES, INDEXES),
    st.builds(PathSize, NAMES, INDEXES, st.booleans()),
    st.builds(Hold, NAMES, INDEXES),
    st.builds(Erase, NAMES, st.none() | INDEXES),
    st.builds(
        Report,
        st.dictionaries(NAMES, TRAFFIC, max_size=2),
        COUNTERS,
        COUNTERS,
        st.lists(st.tuples(NAMES, INDEXES), max_size=2).map(tuple),
    ),
)


@given(MESSAGES)
def test_what_is_said_is_heard(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_is_raised(data: bytes) -> None:
    try:
        decode(data)
    except BadPacket:
        return


@given(MESSAGES, st.data())
def test_a_damaged_message_is_refused_or_means_something(message: Message, data: st.DataObject) -> None:
    damaged = encode(message)
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    try:
        decode(damaged)
    except BadPacket:
        return


def test_keys_are_in_no_repr_and_only_in_an_install() -> None:
    key = bytes(range(32))
    install = Install("bob", 1, 0x10, 0x20, Cipher.AES_256_GCM, EpochState.QKD, 9.0, True, key, key[::-1])
    assert "\\x01" not in repr(install) and "send_key" not in repr(install)
    assert bytes(encode(install)[2:66]) == key + key[::-1]
    with pytest.raises(BadPacket):
        decode(encode(install)[:1] + b"\x20" + encode(install)[34:])  # one key of the two
    with pytest.raises(BadPacket):
        decode(bytes([messages._KINDS.index(Usable), 64]) + bytes(64) + b'["bob",1]')
