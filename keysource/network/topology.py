"""The map of a network, the same file at every node: who there is, which links, which ends want keys.

Checked whole before anything is opened.  A node believes the map, not what a message says about it: a path that is
none here, or one over too many nodes, is refused by both ends.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from keysource.base import Origin, Owner
from keysource.kme.config import ListenAddress, Name, Rate, Url
from keysource.kme.records import weakest
from keysource.network.errors import TopologyError
from keysource.settings import mistakes

EXAMPLE = """\
version = 1                      # the same file at every node

[[node]]
id = "kme-paris"                 # the common name of its certificate
url = "https://192.0.2.1:8450"   # its listen

[[node]]
id = "kme-dijon"
url = "https://192.0.2.2:8450"

[[node]]
id = "kme-lyon"
url = "https://192.0.2.3:8450"

[[link]]                         # a QKD link; its devices say the same name; a second fibre is one more of them
name = "paris-dijon"
ends = ["kme-paris", "kme-dijon"]
# origin = "qkd"                 # or "simulated"; a key is worth what the weakest link on its way is worth

[[link]]
name = "dijon-lyon"
ends = ["kme-dijon", "kme-lyon"]

[[connection]]                   # two ends that want keys; the first one begins
name = "paris-lyon"
ends = ["kme-paris", "kme-lyon"]
paths = 1                        # shares over so many paths that have no node in common; all of them are needed
max_hops = 4                     # the most trusted nodes on a path
# block_keys = 32                # most keys that are relayed together
# keys_per_second = 0.0          # the most that are relayed; 0: as many as the links give
# owner = "alternate"            # which end issues them: "alternate", "a" (the first end), "b"
"""
_Model = TypeVar("_Model", bound=BaseModel)
MOST_PATHS, MOST_HOPS, MOST_NODES, MOST_KEYS = 8, 16, 256, 1024


def _origin(value: object) -> object:
    return Origin(value) if isinstance(value, str) and value in tuple(Origin) else value


def _owner(value: object) -> object:
    return Owner(value) if isinstance(value, str) and value in tuple(Owner) else value


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Ends = Annotated[tuple[Name, Name], BeforeValidator(_pair)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class NodeEntry(Table):
    id: Name
    url: Url


class LinkEntry(Table):
    name: Name
    ends: Ends
    origin: Annotated[Origin, BeforeValidator(_origin)] = Origin.QKD

    def other(self, node: str) -> str:
        return self.ends[1] if node == self.ends[0] else self.ends[0]


class Connection(Table):
    """Two ends that share relayed keys; the first begins every block."""

    name: Name
    ends: Ends
    paths: int = Field(default=1, ge=1, le=MOST_PATHS)
    max_hops: int = Field(default=8, ge=0, le=MOST_HOPS)
    block_keys: int = Field(default=32, ge=1, le=MOST_KEYS)
    keys_per_second: Rate = 0.0
    owner: Annotated[Owner, BeforeValidator(_owner)] = Owner.ALTERNATE

    def other(self, node: str) -> str:
        return self.ends[1] if node == self.ends[0] else self.ends[0]


class Topology(Table):
    """The whole file."""

    version: Literal[1]
    node: list[NodeEntry] = Field(min_length=2, max_length=MOST_NODES)
    link: list[LinkEntry] = Field(min_length=1)
    connection: list[Connection] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_fit(self) -> Topology:
        nodes = [node.id for node in self.node]
        entries: list[LinkEntry | Connection] = [*self.link, *self.connection]
        for kind, names in (
            ("node id", nodes),
            ("name of a link or connection", [entry.name for entry in entries]),
        ):
            if doubled := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{kind} {doubled!r} stands twice")
        for entry in entries:
            if strange := [end for end in entry.ends if end not in nodes]:
                raise ValueError(f"{entry.name!r} ends at {strange[0]!r}, which is no [[node]]")
            if entry.ends[0] == entry.ends[1]:
                raise ValueError(f"{entry.name!r} ends where it begins")
        return self

    def url_of(self, node: str) -> str:
        return next(entry.url for entry in self.node if entry.id == node)

    def links_between(self, left: str, right: str) -> list[LinkEntry]:
        """All that join two nodes, two fibres perhaps: a hop goes over any of them."""
        return [link for link in self.link if {left, right} == set(link.ends)]

    def links_of(self, node: str) -> list[LinkEntry]:
        return [link for link in self.link if node in link.ends]

    def connections_of(self, node: str) -> list[Connection]:
        return [connection for connection in self.connection if node in connection.ends]

    def connection_named(self, name: str) -> Connection | None:
        return next((connection for connection in self.connection if connection.name == name), None)

    def path_mistake(self, connection: Connection, path: Sequence[str]) -> str:
        """Why this is no path of that connection, one sentence; empty where it is one."""
        if tuple(path[:1]) != connection.ends[:1] or tuple(path[-1:]) != connection.ends[1:]:
            return f"a path of {connection.name!r} does not lead from one of its ends to the other"
        if len(set(path)) != len(path):
            return "a path crosses itself"
        if not all(self.links_between(*pair) for pair in itertools.pairwise(path)):
            return "a path uses a link that is not on the map"
        if len(path) - 2 > connection.max_hops:
            return f"a path has {len(path) - 2} trusted nodes, at most {connection.max_hops} are allowed"
        return ""

    def paths_mistake(self, connection: Connection, paths: Sequence[Sequence[str]]) -> str:
        """The same for all paths of a block: as many as the map wants, and no node on two of them."""
        if len(paths) != connection.paths:
            return f"{len(paths)} paths where {connection.name!r} has {connection.paths}"
        for path in paths:
            if mistake := self.path_mistake(connection, path):
                return mistake
        inner = [node for path in paths for node in path[1:-1]]
        if len(set(inner)) != len(inner) or sum(len(path) == 2 for path in paths) > 1:
            return "two paths have a node or link in common"
        return ""

    def origin_over(self, paths: Sequence[Sequence[str]]) -> Origin:
        """What a key may claim that came over these paths.  Never ``qkd``: the keys of a connection do not change the
        origin with the way, and one over a direct link is relayed over no trusted node."""
        pairs = [pair for path in paths for pair in itertools.pairwise(path)]
        return weakest([Origin.RELAYED, *(link.origin for pair in pairs for link in self.links_between(*pair))])

    def origin_at_most(self) -> Origin:
        """What the worst key of this network may claim."""
        return weakest([Origin.RELAYED, *(link.origin for link in self.link)])


def hops_over(paths: Sequence[Sequence[str]]) -> int:
    """Trusted nodes on the longest path."""
    return max(len(path) - 2 for path in paths)


class NodeTable(Table):
    id: Name
    topology: str
    listen: ListenAddress
    certificate: str
    private_key: str
    ca: str
    store: str
    site_key: str | None = None
    epoch_keys: str | None = None
    control: str | None = None
    audit: str | None = None
    max_units: int = Field(default=100_000, ge=16, le=10_000_000)


class NodeLimits(Table):
    requests_per_second: Rate = 200.0
    burst: int = Field(default=2000, ge=1)


class DeviceTable(Table):
    name: Name
    device: str


class SocketTable(Table):
    name: Name
    socket: str


class NodeConfig(Table):
    """A node's own file: its place on the map, its certificate, its devices, and who drinks from it."""

    version: Literal[1]
    node: NodeTable
    limits: NodeLimits = Field(default_factory=NodeLimits)
    link: list[DeviceTable] = Field(min_length=1)
    connection: list[SocketTable] = Field(default_factory=list)


NODE_EXAMPLE = """\
version = 1

[node]
id = "kme-paris"
topology = "network.toml"           # the map, the same at every node
listen = "192.0.2.1:8450"           # for the other nodes (TLS, both sides with certificates)
certificate = "pki/kme-paris.crt"
private_key = "pki/kme-paris.key"   # mode 0600
ca = "pki/ca.crt"
store = "state/relay.sqlite"        # in a folder of its own, mode 0700; never restore it from a backup
# site_key = "site.key"             # wraps what is stored; default: one beside the store
# epoch_keys = "..."                # as in the KME's file
# control = "state/control.sock"    # qvpn-kme network status; default: beside the store
# audit = "state/audit.jsonl"        # which keys passed, were committed, were handed out; default: beside the store
# max_units = 100000                # of 256 bits, kept per link

[limits]                            # both optional
# requests_per_second = 200.0       # of one other node; 0: as many as it likes
# burst = 2000                      # requests that it may make at once after a rest

[[link]]
name = "paris-dijon"
device = "link/device.sock"         # the QKD device at this end of it

[[connection]]                      # only at an end of one
name = "paris-lyon"
socket = "relayed.sock"             # a device socket: [[link]] device of the KME, or a key source of the tunnel
"""


def load_topology(file: Path) -> Topology:
    """Raises :class:`TopologyError`, one line per mistake."""
    return _load(file, Topology)


def load_node(file: Path) -> tuple[NodeConfig, Topology]:
    """A node's file and the map that it names, which must fit.  Raises :class:`TopologyError`."""
    config = _load(file, NodeConfig)
    topology = load_topology(file.parent / config.node.topology)
    mine = config.node.id
    if mine not in [node.id for node in topology.node]:
        raise TopologyError(f"{file}: [node] id: {mine!r} is not on the map")
    for what, named, known in (
        ("link", [x.name for x in config.link], [x.name for x in topology.links_of(mine)]),
        ("connection", [x.name for x in config.connection], [x.name for x in topology.connections_of(mine)]),
    ):
        if sorted(named) != sorted(known):
            raise TopologyError(
                f"{file}: [[{what}]]: the map gives {mine!r} {', '.join(sorted(known)) or 'none'};"
                f" the file has {', '.join(sorted(named)) or 'none'}"
            )
    return config, topology


def _load(file: Path, model: type[_Model]) -> _Model:
    try:
        table = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise TopologyError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TopologyError(f"{file}: not UTF-8 text") from None
    except ValueError as error:
        raise TopologyError(f"{file}: not TOML: {error}") from None
    try:
        return model.model_validate(table)
    except ValidationError as error:
        lines = [f"{file}: {'.'.join(map(str, place))}: {text}" for place, text in mistakes(error)]
        raise TopologyError("\n".join(line.replace(": : ", ": ") for line in lines)) from None
