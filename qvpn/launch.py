"""``qvpn up`` and ``qvpn check``: from a file to a running daemon with the real edges.

Order of a start: read and check every file; open what needs rights (state folder, port, TUN, control socket); give
the rights up; only then start key sources and peers.  Whatever fails is one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from keysource.alarm import with_alarm
from keysource.base import Checkable, KeySource, SourceContext
from keysource.doctor import examine
from keysource.errors import BadSettings, KeySourceError
from keysource.registry import open_source
from qvpn import privileged
from qvpn.config.checks import carries_ipv6, harvestable
from qvpn.config.errors import ConfigError
from qvpn.config.schema import MIN_MTU, MIN_MTU_IPV6, Config, Peer
from qvpn.control.clockwatch import ClockWatch
from qvpn.control.endpoint import literal
from qvpn.control.mistakes import describe
from qvpn.control.supervisor import SourceRefused
from qvpn.daemon import Daemon
from qvpn.dataplane import collector
from qvpn.dataplane.loop import PacketLoop
from qvpn.dataplane.plane import tunnel_mtu
from qvpn.lanes.keeper import LaneKit
from qvpn.netio.base import Address, Bind
from qvpn.netio.errors import NetioError
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import FALLBACK_PAYLOAD, UdpBind
from qvpn.observe import eventlog
from qvpn.privileged import PrivilegedError
from qvpn.sitefiles import SiteFiles, load_site
from qvpn.transports.base import BadTransport, Transport, TransportContext
from qvpn.transports.registry import factory, open_transport
from qvpn.uapi import ControlServer

_NOWHERE = Address(ipaddress.IPv4Address(0), 1)
DEFAULT_PAYLOAD = 1500 - 48
"""UDP payload of an Ethernet path over IPv6, where no peer's address is known yet."""


def check(file: Path) -> list[str]:
    """Check a configuration and every file it names; lines for a person.  Raises ConfigError."""
    site = load_site(file)
    for source_name, made in open_sources(site).items():
        if isinstance(made, Checkable):
            _check_files(site.config, source_name, made)
    transports = open_transports(site)
    lines = [f"{file}: fine", f'site "{site.config.site.name}": fingerprint {site.identity.public.readable}']
    for peer in site.config.peer:
        keys = site.peers[peer.name]
        source = "no key source" if peer.key_source is None else f"key source {peer.key_source}"
        lines.append(f'peer "{peer.name}": {peer.policy}, {source}, fingerprint {keys.public[0].readable}')
    lines += [f"carrier {name}: {describe}" for name, each in transports.items() if (describe := _shown(each))]
    lines += [
        f"key source {name} ({table.type}): {harvestable(table)}" for name, table in site.config.key_source.items()
    ]
    return lines


def _check_files(config: Config, name: str, source: Checkable) -> None:
    try:
        source.check_files()
    except KeySourceError as error:
        raise source_error(config, name, error) from None


def open_sources(site: SiteFiles) -> dict[str, KeySource]:
    """Make every key source that a peer uses or that stands in the file; nothing is opened yet.

    Raises ConfigError that names the table.
    """
    made: dict[str, KeySource] = {}
    for name in site.config.key_source:
        _open_source(site.config, name, made, ())
    return made


def open_transports(site: SiteFiles) -> dict[str, Transport]:
    """Make every transport that a peer may use; nothing is opened yet.  Raises ConfigError that names the table."""
    config = site.config
    context = TransportContext(
        base=config.folder,
        state=config.path(config.site.state),
        read_file=_reader(privileged.read_public),
        read_secret=_reader(privileged.read_secret),
        write_secret=_write_secret,
        clock=privileged.boottime,
        call_later=lambda seconds, callback: asyncio.get_running_loop().call_later(seconds, callback),
        log=eventlog.get_log(site=config.site.name),
    )
    made: dict[str, Transport] = {}
    for peer in config.peer:
        for name in peer.transport:
            table, own = config.carrier.get(name), peer.carriers.get(name)
            where = f'[[peer]] "{peer.name}"'
            try:
                if name not in made:
                    factory(name)
                    where = f"[carrier.{name}]"
                    made[name] = open_transport(name, {} if table is None else table.settings, context)
                    where = f'[[peer]] "{peer.name}"'
                made[name].reach(_NOWHERE, {} if own is None else own.options)
            except BadTransport as error:
                raise ConfigError(str(error), file=config.file, table=where, key=error.key) from None
    if unused := sorted(set(config.carrier) - set(made)):
        raise ConfigError("no peer uses this transport", file=config.file, table=f"[carrier.{unused[0]}]")
    return made


def _options(peer: Peer) -> dict[str, Any]:
    """Of the preferred transport."""
    table = peer.carriers.get(peer.transport[0])
    return {} if table is None else table.options


def _shown(transport: Transport) -> str:
    """What an operator copies to the other site."""
    fingerprint = getattr(transport, "fingerprint", None)
    return "" if fingerprint is None else f"certificate with SHA-256 {fingerprint}"


def doctor(file: Path) -> dict[str, list[dict[str, str]]]:
    """What :mod:`keysource.doctor` finds about every key source, by name.  Raises ConfigError."""
    site = load_site(file)
    sources = open_sources(site)
    with contextlib.suppress(OSError):  # a source that needs it says why it cannot be used
        site.config.path(site.config.site.state).mkdir(mode=0o700, exist_ok=True)
    found = {}
    for name, table in site.config.key_source.items():
        if table.type in ("failover", "combine"):
            continue  # its parts stand in tables of their own
        peers = _peers_at(site.config, name)
        findings = asyncio.run(examine(table.settings, _context(site.config, name), sources[name], peers))
        found[name] = [asdict(finding) for finding in findings]
    return found


def _peers_at(config: Config, name: str) -> list[str]:
    """What the peers that draw from a source, alone or as a part of another, are called there."""
    found = [peer.sae for peer in config.peer if peer.key_source == name]
    for whole, table in config.key_source.items():
        if table.type in ("failover", "combine") and name in table.settings.get("sources", ()):
            renamed = table.settings.get("peer_sae", {}).get(name)
            found += [renamed] if renamed else [peer.sae for peer in config.peer if peer.key_source == whole]
    return found


def _context(config: Config, name: str) -> SourceContext:
    return SourceContext(
        name=name,
        base=config.folder,
        state=config.path(config.site.state),
        site=config.site.name,
        read_file=_reader(privileged.read_public),
        read_secret=_reader(privileged.read_secret),
    )


def _open_source(config: Config, name: str, made: dict[str, KeySource], within: tuple[str, ...]) -> KeySource:
    """The source of that table, made once.  ``within`` are the sources that are being made of it."""

    def other(wanted: str) -> KeySource:
        if wanted not in config.key_source:
            raise BadSettings(f"there is no table [key_source.{wanted}]")
        if wanted in (*within, name):
            raise BadSettings(f"[key_source.{wanted}] cannot be a part of itself")
        return _open_source(config, wanted, made, (*within, name))

    if name in made:
        return made[name]
    table = config.key_source[name]
    context = replace(_context(config, name), other=other)
    try:
        source = open_source(table.type, table.settings, context)
        made[name] = with_alarm(source, name, config.path(config.site.state))
        return made[name]
    except BadSettings as error:
        raise source_error(config, name, error) from None


def source_error(config: Config, name: str, error: KeySourceError) -> ConfigError:
    """What a key source says of its table, with file and table named."""
    key = error.key if isinstance(error, BadSettings) else ""
    text = str(error).removeprefix(f"{key}: ") if key else str(error)
    return ConfigError(text, file=config.file, table=f"[key_source.{name}]", key=key)


def _reader(read: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    """Key sources know OSError and ValueError, not our errors."""

    def reader(path: Path) -> bytes:
        try:
            return read(path)
        except PrivilegedError as error:
            raise ValueError(str(error)) from None

    return reader


def _write_secret(path: Path, data: bytes) -> None:
    try:
        privileged.write_secret(path, data)
    except PrivilegedError as error:
        raise ValueError(str(error)) from None


def run(file: Path) -> None:
    """Run the daemon until it is told to stop.

    Raises:
        ConfigError, PrivilegedError: it could not start; one sentence.
    """
    site = load_site(file)
    sources = open_sources(site)
    transports = open_transports(site)
    privileged.require_net_admin()
    privileged.no_core()
    eventlog.configure()
    with ExitStack() as stack:
        try:
            daemon, control = _open(site, sources, transports, stack)
        except (NetioError, BadTransport) as error:
            raise PrivilegedError(str(error)) from None
        # Nothing is running yet: capabilities belong to threads, and later threads inherit the reduced set.
        privileged.drop_privileges(low_port=site.config.site.listen.port < 1024)
        with asyncio.Runner(loop_factory=PacketLoop) as runner:
            runner.run(_serve(daemon, control))
    if daemon.failure is not None:
        raise PrivilegedError(daemon.failure)


def _open(
    site: SiteFiles, sources: dict[str, KeySource], transports: dict[str, Transport], stack: ExitStack
) -> tuple[Daemon, socket.socket]:
    config = site.config
    state = config.path(config.site.state)
    stack.enter_context(contextlib.closing(privileged.StateFolder(state)))
    port = stack.enter_context(contextlib.closing(privileged.open_bind(config.site.listen)))
    bind: Bind = port
    for transport in transports.values():
        bind = stack.enter_context(contextlib.closing(transport.over(bind)))
    more = config.tunnel.lanes - 1
    tun = stack.enter_context(contextlib.closing(privileged.open_tun(config.tunnel.interface, queues=more > 0)))
    lanes = [stack.enter_context(contextlib.closing(_lane(tun, port, number))) for number in range(1, more + 1)]
    routes = [network for peer in config.peer for network in peer.allowed_ips]
    places = [
        transports[peer.transport[0]].reach(literal(peer.endpoint), _options(peer))
        for peer in config.peer
        if peer.endpoint is not None and peer.endpoint.ip
    ]
    # A path whose MTU cannot be read (no route yet) says nothing; it is looked at when the tunnel runs.
    payloads = [payload for place in places if (payload := bind.max_payload(place)) != FALLBACK_PAYLOAD]
    mtu = tunnel_mtu_for(config, payloads)
    privileged.fence(routes)
    stack.callback(privileged.unfence, routes)
    privileged.configure_tun(tun.name, config.tunnel.addresses, mtu, routes)
    control = privileged.control_socket(state / "control.sock")
    stack.callback(privileged.remove_socket, control, state / "control.sock")
    entry = privileged.RunEntry(config.site.name, state / "control.sock")
    stack.callback(entry.remove)
    with contextlib.suppress(OSError):
        entry.publish()

    def fit(payloads: Sequence[int]) -> None:
        wanted = tunnel_mtu_for(config, payloads)
        if wanted != tun.mtu:
            privileged.set_mtu(tun.name, wanted)

    readers = [stack.enter_context(contextlib.closing(reader)) for reader in privileged.open_generations()]
    watch = ClockWatch(privileged.boottime, time.time, [reader.generation for reader in readers])
    return Daemon(site, tun, bind, sources, fit_mtu=fit, watch=watch, lanes=lanes, transports=transports), control


def _lane(tun: TunDevice, bind: UdpBind, number: int) -> LaneKit:
    """Lane ``number`` listens that many ports above lane 0."""
    local = replace(bind.local, port=bind.local.port + number)
    queue, listener = privileged.open_lane(tun.name, local)
    return LaneKit(number, local.port, queue, listener)


def tunnel_mtu_for(config: Config, payloads: Sequence[int]) -> int:
    """What the configuration says, else what the widest of the paths to known peers carries.

    Not the narrowest: one peer on a bad line, or an outsider who spoils one path, would slow all others.  Who sends
    too long packets to a peer behind a narrower path is told so by the packet path, and TCP is cut there.
    """
    if config.tunnel.mtu is not None:
        return config.tunnel.mtu
    mtu = tunnel_mtu(max(payloads, default=DEFAULT_PAYLOAD))
    return max(mtu, MIN_MTU_IPV6 if carries_ipv6(config) else MIN_MTU)


async def _serve(daemon: Daemon, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_mistake)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.stop_wanted.set)

    def stop() -> dict[str, object]:
        daemon.stop_wanted.set()
        return {}

    commands: dict[str, Callable[[], dict[str, object]]] = {
        "status": lambda: {"status": daemon.snapshot().to_json()},
        "stop": stop,
    }
    control = ControlServer(listener, commands, {"alarm": daemon.order_alarm})
    await control.start()
    starting = loop.create_task(daemon.start())
    wanted = loop.create_task(daemon.stop_wanted.wait())
    try:
        await asyncio.wait((starting, wanted), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            collector.settle()
            await wanted
    except SourceRefused as refused:
        raise source_error(daemon.config, refused.name, refused.error) from None
    finally:
        starting.cancel()
        wanted.cancel()
        await asyncio.gather(starting, wanted, return_exceptions=True)
        await daemon.stop()
        await control.aclose()


def _log_mistake(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Instead of asyncio's own traceback on standard error."""
    error = context.get("exception")
    facts = describe(error) if isinstance(error, BaseException) else {}
    eventlog.get_log().error("internal error", what=context.get("message"), **facts)
