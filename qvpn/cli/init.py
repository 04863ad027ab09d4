"""``qvpn init``: two site folders that become a tunnel when copied to two hosts.

The folders are made beside their final place and moved in when they are complete, so a failure leaves nothing.  Key
material, KME and link files are made by the programs that own them.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated

import typer

from qvpn import privileged
from qvpn.cli.output import fail, usage
from qvpn.cli.templates import PairFacts, SiteFacts, render
from qvpn.config import identity
from qvpn.config.load import parse_config
from qvpn.config.schema import MAX_REKEY, MIN_REKEY
from qvpn.config.units import HostPort, parse_duration, parse_host_port, parse_name, parse_network

KINDS = ("simulated", "etsi014", "file")
_INNER = {"a": "10.90.0.1", "b": "10.90.0.2"}
_INNER_NET = ip_network("10.90.0.0/24")
_PROGRAM_TIMEOUT = 60.0
LINK_PORT = 51850
"""Classical channel of the simulated link at the left site; the next port is the fibre's."""
KME_PORTS = {"a": (8443, 8444), "b": (8445, 8446)}
"""For SAEs (loopback only) and for the other KME; different at both ends, so that one machine can be both."""


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the two site folders are made.")],
    left: Annotated[str, typer.Option(help="Left site: NAME@HOST:PORT; HOST is a name, IPv4 or [IPv6].")],
    right: Annotated[str, typer.Option(help="Right site, likewise.")],
    key_source: Annotated[
        str, typer.Option(help="Where session keys come from: simulated, etsi014 or file.")
    ] = "file",
    allow_simulated: Annotated[
        bool, typer.Option("--allow-simulated", help="Accept keys that give no quantum security.")
    ] = False,
    rekey: Annotated[str, typer.Option(help='Time between two handshakes, such as "60s".')] = "60s",
    left_net: Annotated[list[str] | None, typer.Option(help="Network behind the left site; may be repeated.")] = None,
    right_net: Annotated[list[str] | None, typer.Option(help="Network behind the right site.")] = None,
) -> None:
    """Write the configurations, keys and certificates of two sites, ready to be copied to two hosts."""
    sites = (_site(left, "--left", "a", left_net), _site(right, "--right", "b", right_net))
    _check_usage(sites, key_source, allow_simulated, rekey)
    _check_networks(*sites)
    _refuse_existing(directory, sites)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".qvpn-init-", dir=directory) as work:
            _make(Path(work), directory, sites, key_source, allow_simulated, rekey)
            for site in sites:
                (Path(work) / site.name).rename(directory / site.name)
    except OSError as error:
        raise fail(f"qvpn: {error.filename or directory}: {error.strerror}") from None
    _print_commands(directory, sites, key_source)


def _site(text: str, option: str, end: str, networks: list[str] | None) -> SiteFacts:
    name, at, place = text.partition("@")
    try:
        if not at:
            raise ValueError("write NAME@HOST:PORT")
        named, endpoint = parse_name(name), parse_host_port(place)
    except ValueError as error:
        raise usage(f"{option} {text}: {error}") from None
    return SiteFacts(named, endpoint, end, _INNER[end], tuple(_net(f"{option}-net", one) for one in networks or ()))


def _net(option: str, text: str) -> str:
    try:
        return str(parse_network(text))
    except ValueError as error:
        raise usage(f"{option}: {error}") from None


def _check_usage(sites: Sequence[SiteFacts], kind: str, allow_simulated: bool, rekey: str) -> None:
    if sites[0].name == sites[1].name:
        raise usage("the two sites need different names")
    if kind not in KINDS:
        raise usage(f"--key-source is one of {', '.join(KINDS)}, not {kind!r}")
    try:
        if not MIN_REKEY <= parse_duration(rekey) <= MAX_REKEY:
            raise ValueError('it is outside "1s" to "1h"')
    except ValueError as error:
        raise usage(f"--rekey {rekey}: {error}") from None
    if kind != "file" and not allow_simulated:
        fed = "is" if kind == "simulated" else "means test KMEs that are fed by"
        raise usage(
            f"--key-source {kind} {fed} a simulated link, which gives no quantum security: "
            "say so with --allow-simulated"
        )


def _check_networks(left: SiteFacts, right: SiteFacts) -> None:
    """Each address is at one of the sites: what lies behind both would be routed away from one of them."""
    for option, site in (("--left", left), ("--right", right)):
        if site.endpoint.ip is not None and site.endpoint.ip in _INNER_NET:
            raise usage(f"{option}: {site.endpoint.ip} lies in {_INNER_NET}, which is the inside of the tunnel")
    behind = [
        (f"{option}-net {text}", ip_network(text), site)
        for option, site in (("--left", left), ("--right", right))
        for text in site.networks
    ]
    for (one, network, site), (other, another, its) in itertools.combinations(behind, 2):
        if site is not its and network.version == another.version and network.overlaps(another):
            raise usage(f"{one} and {other} overlap: each address must be behind one site only")
    for one, network, site in behind:
        for place in (left, right):
            if ip_address(place.inner) in network and place is not site:
                raise usage(f"{one} holds {place.inner}, the inner address of site {place.name}")


def _refuse_existing(directory: Path, sites: Sequence[SiteFacts]) -> None:
    if directory.exists() and not directory.is_dir():
        raise fail(f"qvpn: {directory}: is not a folder")
    for site in sites:
        place = directory / site.name
        if place.exists() or place.is_symlink():
            raise fail(f"qvpn: {place}: exists already, and nothing is overwritten")


def _make(
    work: Path, final: Path, sites: tuple[SiteFacts, SiteFacts], kind: str, allow_simulated: bool, rekey: str
) -> None:
    for site in sites:
        (work / site.name).mkdir(mode=0o700)
    source = {"file": _make_file, "etsi014": _make_etsi014, "simulated": _make_simulated}[kind](work, sites)
    pair = PairFacts(kind, rekey, allow_simulated, source)
    for site, peer in (sites, sites[::-1]):
        text = render(site, peer, pair).encode()
        parse_config(text, final / site.name / "qvpn.toml")
        privileged.write_public(work / site.name / "qvpn.toml", text)
        keys = identity.generate()
        privileged.write_secret(work / site.name / f"{site.name}.key", keys.pem())
        for folder in (site.name, peer.name):
            privileged.write_public(work / folder / f"{site.name}.pub", keys.public.pem())


def _make_file(work: Path, sites: tuple[SiteFacts, SiteFacts]) -> dict[str, dict[str, object]]:
    _program("keysource.file", *(str(work / site.name / "courier.keys") for site in sites))
    return {site.name: {"path": "courier.keys", "end": site.end} for site in sites}


def _make_etsi014(work: Path, sites: tuple[SiteFacts, SiteFacts]) -> dict[str, dict[str, object]]:
    """A test KME at each site, reached over loopback, and the simulated link that feeds both."""
    _pair_link(work, sites)
    options: list[str] = []
    for side, site in zip(("left", "right"), sites, strict=True):
        ports = KME_PORTS[site.end]
        options += [f"--{side}", site.name, f"--{side}-host", site.endpoint.host, f"--{side}-sae-host", "127.0.0.1"]
        options += [f"--{side}-port", str(ports[0]), f"--{side}-peer-port", str(ports[1])]
        options += [f"--{side}-device", "device.sock"]
    _program("keysource.kme.cli", "pair", str(work), *options)
    return {site.name: _kme_table(site) for site in sites}


def _kme_table(site: SiteFacts) -> dict[str, object]:
    return {
        "url": f"https://127.0.0.1:{KME_PORTS[site.end][0]}",
        "sae": site.sae,
        "kme": f"kme-{site.name}",
        "origin": "simulated",
        "hop": "local",
        "ca": "pki/ca.crt",
        "certificate": f"pki/{site.sae}.crt",
        "private_key": f"pki/{site.sae}.key",
    }


def _make_simulated(work: Path, sites: tuple[SiteFacts, SiteFacts]) -> dict[str, dict[str, object]]:
    """Only the pad is used of what ``qvpn-qkd pair`` makes: the daemon runs the link's ends by itself."""
    _pair_link(work, sites)
    left = sites[0].endpoint.host
    place, fibre = str(HostPort(left, LINK_PORT)), str(HostPort(left, LINK_PORT + 1))
    for site in sites:
        (work / site.name / "link.toml").unlink()
    shared: dict[str, object] = {"fibre": fibre, "auth_key": "auth.pad", "preset": "demo"}
    return {
        sites[0].name: {"role": "left", "listen": place, **shared},
        sites[1].name: {"role": "right", "peer": place, **shared},
    }


def _pair_link(work: Path, sites: tuple[SiteFacts, SiteFacts]) -> None:
    names = ["--left", sites[0].name, "--right", sites[1].name]
    place = ["--left-host", sites[0].endpoint.host, "--port", str(LINK_PORT)]
    _program("keysource.qkd", "pair", str(work), *names, *place)


def _program(module: str, *arguments: str) -> str:
    """Run a program of this installation to its end and return its output; a failure ends ``init``."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_PROGRAM_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise fail(f"qvpn: {module} did not end within {_PROGRAM_TIMEOUT:.0f} seconds") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise fail(f"qvpn: {module} failed: {lines[-1] if lines else error.returncode}") from None
    return done.stdout


def _print_commands(directory: Path, sites: Sequence[SiteFacts], kind: str) -> None:
    """What to do next, on each host."""
    for site in sites:
        print(
            f"site {site.name}: copy {directory / site.name} to {site.endpoint.host} (it holds secrets), then there:"
        )
        if kind == "etsi014":
            print(f"    qvpn-qkd run {site.name}/link.toml")
            print(f"    qvpn-kme serve {site.name}/kme.toml")
        print(f"    qvpn up {site.name}/qvpn.toml          # as root")
    ports = [f"UDP {sites[0].endpoint.port} and {sites[1].endpoint.port}"]
    if kind != "file":
        ports.append(f"TCP {LINK_PORT} and {LINK_PORT + 1} at {sites[0].name} (simulated link)")
    if kind == "etsi014":
        ports += [f"TCP {KME_PORTS[site.end][1]} at {site.name} (KME to KME)" for site in sites]
    print(f"ports that must be open: {', '.join(ports)}")
    print(f"then, from {sites[0].name}: ping {sites[1].inner}")
