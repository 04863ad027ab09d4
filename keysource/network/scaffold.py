"""``qvpn-kme network write``: from a map to a folder per node, with a test PKI, to be copied to the nodes' hosts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from keysource.kme.pki import Authority, write_new
from keysource.network.errors import TopologyError
from keysource.network.topology import Topology, load_topology
from keysource.settings import Address


def write_nodes(folder: Path, map_file: Path, authority: Authority | None = None) -> dict[str, Path]:
    """Write ``folder/NODE/`` for every node of the map; returns the configuration files.

    Raises:
        TopologyError: the map is wrong, or a file is there already.
    """
    topology = load_topology(map_file)
    text = map_file.read_bytes()
    authority = authority or Authority("test CA of a QKD network")
    try:
        return {node.id: _write(folder / node.id, topology, node.id, text, authority) for node in topology.node}
    except OSError as error:
        raise TopologyError(f"{error.filename}: {error.strerror}") from None


def _write(home: Path, topology: Topology, node: str, text: bytes, authority: Authority) -> Path:
    pki = home / "pki"
    pki.mkdir(mode=0o700, parents=True)
    write_new(pki / "ca.crt", authority.certificate, 0o644)
    parts = urlsplit(topology.url_of(node))
    host = str(parts.hostname)
    authority.kme(node, [host]).write(pki, node)
    write_new(home / "network.toml", text, 0o644)
    for name in ("links", "relayed"):
        (home / name).mkdir(mode=0o700)
    address = Address(host=host, port=parts.port or 443)
    lines = [
        "# `qvpn-kme network serve node.toml`; every key is explained by `qvpn-kme network example`.",
        "# The certificates in pki/ are for tests: the key of their authority was never written.",
        "version = 1\n",
        "[node]",
        f'id = "{node}"',
        'topology = "network.toml"',
        f'listen = "{address}"',
        f'certificate = "pki/{node}.crt"',
        f'private_key = "pki/{node}.key"',
        'ca = "pki/ca.crt"',
        'store = "state/relay.sqlite"',
    ]
    for link in topology.links_of(node):
        lines += ["\n[[link]]", f'name = "{link.name}"', f'device = "links/{link.name}.sock"']
    for connection in topology.connections_of(node):
        lines += ["\n[[connection]]", f'name = "{connection.name}"', f'socket = "relayed/{connection.name}.sock"']
    file = home / "node.toml"
    write_new(file, ("\n".join(lines) + "\n").encode(), 0o644)
    return file
