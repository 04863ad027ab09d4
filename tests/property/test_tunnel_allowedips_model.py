"""Allowed IPs against a model that tries every prefix."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from qvpn.tunnel.allowedips import AllowedIPs, IPNetwork, PrefixTaken


def linear(prefixes: dict[IPNetwork, str], address: bytes) -> str | None:
    """The longest of all prefixes that hold the address, by looking at each."""
    ip = ipaddress.ip_address(address)
    holding = [network for network in prefixes if ip in network]
    return prefixes[max(holding, key=lambda network: network.prefixlen)] if holding else None


def _network(address: int, length: int) -> IPNetwork:
    """Few distinct leading bits, so that prefixes nest often."""
    if length <= 32:
        return ipaddress.ip_network((address & 0xC0A8_00FF, length), strict=False)
    return ipaddress.ip_network((address & (0xFD00 << 112 | 0xFF), length), strict=False)


NETWORKS = st.builds(_network, st.integers(0, (1 << 128) - 1), st.integers(0, 128))
ADDRESSES = st.one_of(
    st.integers(0, 0xFFFFFFFF).map(lambda n: (n & 0xC0A8_00FF).to_bytes(4, "big")),
    st.integers(0, (1 << 128) - 1).map(lambda n: (n & (0xFD00 << 112 | 0xFF)).to_bytes(16, "big")),
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=16, max_size=16),
)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), NETWORKS), max_size=30),
    st.lists(ADDRESSES, min_size=1, max_size=20),
    st.sampled_from("abc"),
)
def test_lookup_equals_the_linear_search(
    prefixes: list[tuple[str, IPNetwork]], addresses: list[bytes], leaver: str
) -> None:
    allowed: AllowedIPs[str] = AllowedIPs()
    model: dict[IPNetwork, str] = {}
    for peer, network in prefixes:
        try:
            allowed.add(peer, [network])
        except PrefixTaken:
            assert model[network] != peer
        else:
            assert model.setdefault(network, peer) == peer
    for address in addresses:
        assert allowed.lookup(address) == linear(model, address)
    allowed.remove(leaver)
    model = {network: peer for network, peer in model.items() if peer != leaver}
    for address in addresses:
        assert allowed.lookup(address) == linear(model, address)
