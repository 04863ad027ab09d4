"""What ``qvpn init`` writes into ``qvpn.toml``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from qvpn.config.schema import default_hard_end
from qvpn.config.units import HostPort, parse_duration, show_duration


@dataclass(frozen=True)
class SiteFacts:
    """One of the two sites, as the command line describes it."""

    name: str
    endpoint: HostPort
    end: str
    """``a`` for the left site, ``b`` for the right one."""
    inner: str
    """Inner IPv4 address."""
    networks: tuple[str, ...] = ()
    """Networks behind the site."""

    @property
    def sae(self) -> str:
        return f"sae-{self.name}"


@dataclass(frozen=True)
class PairFacts:
    """What both sites share."""

    kind: str
    rekey: str
    allow_simulated: bool
    source: dict[str, dict[str, object]] = field(default_factory=dict)
    """By site name: the rest of its ``[key_source.NAME]`` table."""


_HEAD = """\
# qvpn, site {name}.  Paths are relative to this file.  Check it with: qvpn check qvpn.toml
version = 1

[site]
name = {q_name}
identity = {identity}          # private keys of this site: never leaves this host
listen = "[::]:{port}"
state = "state"                 # 0700, locked: what must survive a restart

[tunnel]
interface = "qvpn0"
addresses = ["{inner}/24"]     # add an IPv6 address where wanted: "fd90::{last}/64"
# mtu = 1430                    # default: what the path to the peer carries
"""

_SOURCE = """
[key_source.{source}]
type = "{kind}"
{settings}"""

_PEER = """
[[peer]]
name = {q_name}
public_key = {public}
endpoint = "{endpoint}"
allowed_ips = [{allowed}]
policy = "require-qkd"          # prefer-qkd | pqc-only
rekey = "{rekey}"
# hard_end = "{hard_end}"             # then the keys are erased, whatever happens
key_source = "{source}"
{more}"""

_SIMULATED = """\
allow_simulated = true          # SIMULATED: no quantum security.  Take this line out with a real key source.
"""


def render(site: SiteFacts, peer: SiteFacts, pair: PairFacts) -> str:
    """The whole file."""
    source = {"file": "courier", "etsi014": "kme", "simulated": "link"}[pair.kind]
    settings = "".join(f"{key} = {_toml(value)}\n" for key, value in pair.source[site.name].items())
    return (
        _HEAD.format(
            name=site.name,
            q_name=_toml(site.name),
            identity=_toml(f"{site.name}.key"),
            port=site.endpoint.port,
            inner=site.inner,
            last=site.inner.rsplit(".", 1)[1],
        )
        + _SOURCE.format(source=source, kind=pair.kind, settings=settings)
        + _PEER.format(
            q_name=_toml(peer.name),
            public=_toml(f"{peer.name}.pub"),
            endpoint=peer.endpoint,
            allowed=", ".join(_toml(network) for network in (f"{peer.inner}/32", *peer.networks)),
            rekey=pair.rekey,
            hard_end=_hard_end(pair.rekey),
            source=source,
            more=_peer_more(peer, pair),
        )
    )


def _peer_more(peer: SiteFacts, pair: PairFacts) -> str:
    sae = f"sae = {_toml(peer.sae)}\n" if pair.kind == "etsi014" else ""
    return sae + (_SIMULATED if pair.allow_simulated and pair.kind != "file" else "")


def _hard_end(rekey: str) -> str:
    return show_duration(default_hard_end(parse_duration(rekey)))


def _toml(value: object) -> str:
    """A string, number or boolean as TOML; JSON's form of these is also TOML's."""
    return json.dumps(value)
