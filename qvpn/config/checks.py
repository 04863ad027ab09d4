"""What must hold between tables: networks, hops, policies.  The rest is in the schema."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit

from qvpn.config.errors import ConfigError
from qvpn.config.schema import MIN_MTU_IPV6, Config, Initiate, KeySourceTable, Peer, Policy
from qvpn.config.units import IPAddress, IPNetwork, parse_host_port
from qvpn.status import SIMULATED


def check(config: Config) -> None:
    """Raises :class:`ConfigError` (without the file) for the first thing that does not fit together."""
    _names(config)
    _networks(config)
    _mtu(config)
    _lane_ports(config)
    _lanes_and_carriers(config)
    for peer in config.peer:
        _outer_addresses(config, peer)
        if peer.key_source is not None:
            _key_source(config, peer, peer.key_source)


def _wrong(peer: Peer, key: str, problem: str) -> ConfigError:
    return ConfigError(problem, table=f'[[peer]] "{peer.name}"', key=key)


def _names(config: Config) -> None:
    seen = {config.site.name: "the site itself has this name"}
    for peer in config.peer:
        if peer.name in seen:
            raise _wrong(peer, "name", seen[peer.name])
        seen[peer.name] = "two peers have this name"


def _networks(config: Config) -> None:
    """A packet's destination must name one peer."""
    for peer in config.peer:
        for one, other in itertools.combinations(peer.allowed_ips, 2):
            if _overlap(one, other):
                raise _wrong(peer, "allowed_ips", f"{one} and {other} overlap")
    for left, right in itertools.combinations(config.peer, 2):
        for one, other in itertools.product(left.allowed_ips, right.allowed_ips):
            if _overlap(one, other):
                raise _wrong(right, "allowed_ips", f'{other} overlaps {one} of peer "{left.name}"')


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)


def carries_ipv6(config: Config) -> bool:
    """Does the tunnel have an IPv6 address or network?"""
    networks: list[IPNetwork] = [address.network for address in config.tunnel.addresses]
    for peer in config.peer:
        networks.extend(peer.allowed_ips)
    return any(network.version == 6 for network in networks)


def _mtu(config: Config) -> None:
    mtu = config.tunnel.mtu
    if mtu is not None and mtu < MIN_MTU_IPV6 and carries_ipv6(config):
        raise ConfigError(f"IPv6 needs at least {MIN_MTU_IPV6}", table="[tunnel]", key="mtu")


def _lane_ports(config: Config) -> None:
    """Lane k listens k ports above lane 0."""
    first, lanes = config.site.listen.port, config.tunnel.lanes
    if first + lanes - 1 > 65_535:
        raise ConfigError(
            f"{lanes} lanes from port {first} on need more ports than there are", table="[tunnel]", key="lanes"
        )


def _lanes_and_carriers(config: Config) -> None:
    """A lane beside lane 0 has a UDP port of its own and nothing else."""
    for peer in config.peer:
        if config.tunnel.lanes > 1 and peer.transport != ("udp",):
            raise _wrong(peer, "transport", 'more than one of [tunnel] lanes needs transport = "udp"')


def _outer_addresses(config: Config, peer: Peer) -> None:
    """An address that the tunnel itself needs must not be routed into a tunnel."""
    if peer.endpoint is not None and peer.endpoint.ip is not None:
        _not_inside(config, peer.endpoint.ip, f'[[peer]] "{peer.name}"', "endpoint")
    for carrier in peer.carriers.values():
        if carrier.endpoint is not None and carrier.endpoint.ip is not None:
            _not_inside(config, carrier.endpoint.ip, f'[[peer]] "{peer.name}"', "carriers")
    for name, table in config.key_source.items():
        for key, address in source_addresses(table):
            _not_inside(config, address, f"[key_source.{name}]", key)


def _not_inside(config: Config, address: IPAddress, table: str, key: str) -> None:
    inner = getattr(address, "ipv4_mapped", None) or address  # ::ffff:10.90.0.2 is sent to 10.90.0.2
    for peer in config.peer:
        for network in peer.allowed_ips:
            if inner in network:
                raise ConfigError(
                    f'{inner} lies in {network}, the allowed_ips of peer "{peer.name}": '
                    "the tunnel would have to carry its own traffic",
                    table=table,
                    key=key,
                )


def source_addresses(table: KeySourceTable) -> Iterator[tuple[str, IPAddress]]:
    """The IP addresses in a key source's table, as (key, address); names are not looked up."""
    for key, value in table.settings.items():
        if not isinstance(value, str):
            continue
        host = host_of(value)
        try:
            address = ipaddress.ip_address(host) if host else None
        except ValueError:
            continue
        if address is not None and not address.is_unspecified:
            yield key, address


def host_of(value: str) -> str | None:
    """The host of a URL or of ``HOST:PORT``, without brackets; None for anything else."""
    try:
        if "://" in value:
            return urlsplit(value).hostname
        return parse_host_port(value).host
    except ValueError:
        return None


def _key_source(config: Config, peer: Peer, name: str) -> None:
    table = config.key_source.get(name)
    if table is None:
        known = ", ".join(sorted(config.key_source)) or "none"
        raise _wrong(peer, "key_source", f"there is no table [key_source.{name}]; there are: {known}")
    if "sae" in table.settings and not peer.sae:
        raise _wrong(peer, "sae", f"is missing: [key_source.{name}] must know what the peer is called there")
    if peer.policy is Policy.REQUIRE_QKD:
        _fit_for_require_qkd(config, peer, name, table)
    _owner(peer, name, table)


def _fit_for_require_qkd(config: Config, peer: Peer, name: str, table: KeySourceTable) -> None:
    """Of "failover" every part must be fit, since each may give the key; of "combine" too, since a key is labelled by
    its weakest part.  A part may be made of parts itself."""
    for part, its_table in _leaves(config, name, table, frozenset()).items():
        _simulated(peer, part, its_table)
        _harvest(peer, part, its_table)


def _leaves(config: Config, name: str, table: KeySourceTable, above: frozenset[str]) -> dict[str, KeySourceTable]:
    """The tables at the bottom of one that is made of others; itself where it is not.  A table that is a part of
    itself is refused where the sources are made."""
    above |= {name}
    found: dict[str, KeySourceTable] = {}
    for part in _parts(table):
        if part in config.key_source and part not in above:
            found |= _leaves(config, part, config.key_source[part], above)
    return found or {name: table}


def _parts(table: KeySourceTable) -> list[str]:
    """The tables that one is made of; none where it stands for itself."""
    given = table.settings.get("sources")
    if table.type not in ("failover", "combine") or not isinstance(given, list):
        return []
    return [part for part in given if isinstance(part, str)]


def _simulated(peer: Peer, name: str, table: KeySourceTable) -> None:
    if is_simulated(table) and not peer.allow_simulated:
        raise _wrong(
            peer,
            "allow_simulated",
            f"[key_source.{name}] is simulated and gives no quantum security: "
            'policy "require-qkd" takes its keys only with allow_simulated = true',
        )


def is_simulated(table: KeySourceTable) -> bool:
    """Does the configuration itself say that these keys give no quantum security?"""
    return table.type == "simulated" or table.settings.get("origin") == "simulated"


def _harvest(peer: Peer, name: str, table: KeySourceTable) -> None:
    host = _crosses_classical_tls(table)
    if host is None or table.settings.get("accept_harvestable_hop") is True:
        return
    raise ConfigError(
        f"keys come from {host} over classical TLS: whoever records that today can read them with a quantum "
        f'computer, so policy "require-qkd" of peer "{peer.name}" takes them only with '
        'accept_harvestable_hop = true (or hop = "zone" inside one trusted perimeter)',
        table=f"[key_source.{name}]",
        key="hop",
    )


def _hop(table: KeySourceTable) -> str:
    default = "classical-tls" if isinstance(table.settings.get("url"), str) else "local"
    return str(table.settings.get("hop", default))


def _crosses_classical_tls(table: KeySourceTable) -> str | None:
    """The host that keys come from over a wire under classical key exchange only; None where they do not."""
    url = table.settings.get("url")
    host = host_of(url) if isinstance(url, str) else None
    return host if host is not None and _hop(table) == "classical-tls" and not is_local(host) else None


def harvestable(table: KeySourceTable) -> str:
    """One line for people: what survives of this source's keys when its last hop is recorded today."""
    host = _crosses_classical_tls(table)
    if parts := _parts(table):
        return f"one of {' and '.join(parts)}" if table.type == "failover" else f"all of {' and '.join(parts)}"
    if is_simulated(table):
        return f"{SIMULATED} (hop {_hop(table)})"
    if host is None:
        return f"hop {_hop(table)}, its keys survive harvesting of that hop"
    return (
        f"hop classical-tls to {host}: recorded today and broken by a quantum computer later, its keys are known; "
        "then ML-KEM, X25519 and the PSK (if set) are what is left"
    )


def is_local(host: str) -> bool:
    """Does the host name this machine's loopback?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _owner(peer: Peer, name: str, table: KeySourceTable) -> None:
    """The initiator issues; so a side that always starts must own keys, and one that never does need not."""
    owner, end = table.settings.get("owner"), table.settings.get("end")
    if owner not in ("a", "b") or end not in ("a", "b"):
        return
    ours = owner == end
    if peer.initiate is Initiate.ALWAYS and not ours:
        raise _wrong(
            peer, "initiate", f'"always" cannot work: the keys of [key_source.{name}] belong to the other end'
        )
    if peer.initiate is Initiate.NEVER and ours:
        raise _wrong(peer, "initiate", f'"never" cannot work: the keys of [key_source.{name}] belong to this end')
