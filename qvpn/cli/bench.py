"""``qvpn bench``: what the ciphers, the packet path and the whole tunnel cost on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from qvpn.cli.output import fail, usage

bench = typer.Typer(
    name="bench",
    help="Measure: crypto alone, the packet path in memory, the whole tunnel beside other programs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Rounds = Annotated[int, typer.Option(min=1, max=50, help="Interleaved rounds; medians are shown.")]


@bench.command("crypto")
def crypto(rounds: Rounds = 5, json: Json = False) -> None:
    """AEAD by size and cipher, handshakes by suite: CPU time of one thread."""
    from qvpn.bench import crypto as measured
    from qvpn.bench.output import show
    from qvpn.bench.run import say

    aeads, shakes = measured.aead(rounds, say), measured.handshakes(max(rounds, 3), say)
    tables = measured.aead_table(aeads), measured.handshake_table(shakes)
    show(json, measured.plain(aeads, shakes), *tables)


@bench.command("memory")
def memory(rounds: Rounds = 5, json: Json = False) -> None:
    """The packet path without a kernel, with many peers and many allowed prefixes: CPU time of one thread."""
    from qvpn.bench import memory as measured
    from qvpn.bench.output import show
    from qvpn.bench.run import say

    costs = measured.run(rounds, say)
    show(json, {"memory": measured.plain(costs)}, measured.table(costs))


@bench.command("floor")
def floor(rounds: Rounds = 5, json: Json = False) -> None:
    """What the packet path cannot cost less than (AEAD calls, system calls), and what it costs, in lock-step."""
    from qvpn.bench import floor as measured

    if code := measured.main(rounds, as_json=json):
        raise typer.Exit(code)


@bench.command("rekey")
def rekey(
    rounds: Rounds = 5,
    seconds: Annotated[int, typer.Option(min=1, max=60, help="Seconds of each TCP transfer.")] = 6,
    json: Json = False,
) -> None:
    """What a rekey costs both daemons, and what one each second takes from a transfer; about 15 s a run."""
    from qvpn.bench import rekey as measured

    if code := measured.main(rounds, seconds, as_json=json):
        raise typer.Exit(code)


@bench.command("net")
def net(
    rounds: Rounds = 5,
    seconds: Annotated[int, typer.Option(min=1, max=60, help="Seconds of each TCP transfer.")] = 2,
    peers: Annotated[str, typer.Option(help="Others to measure beside, such as wireguard-go,openvpn; or all.")] = "",
    links: Annotated[str, typer.Option(help="default,tx-off,no-uso,jumbo; or all.")] = "default",
    measures: Annotated[str, typer.Option(help="Some of tcp1,tcp4,udp,idle,hot,load.")] = "",
    extras: Annotated[
        bool, typer.Option(help="Suites 02 and 03, two lanes, rekeys each second and each minute, and carriers, too.")
    ] = False,
    carriers: Annotated[bool, typer.Option("--carriers", help="qvpn over QUIC and OpenVPN over TCP, too.")] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Fetch the other programs first (Debian, root).")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Folder for results.md, results.json and chart.svg.")] = None,
    json: Json = False,
) -> None:
    """The whole path: real daemons in two namespaces on one veth pair, beside other tunnel programs."""
    from qvpn.bench.cases import EVERYTHING, PEERS
    from qvpn.bench.link import LINKS
    from qvpn.bench.run import Settings, main

    if install:
        _install()
    settings = Settings(
        rounds=rounds,
        seconds=seconds,
        peers=_chosen(peers, tuple(PEERS), "--peers"),
        links=_chosen(links, tuple(LINKS), "--links"),
        measures=_chosen(measures, EVERYTHING, "--measures"),
        extras=extras,
        carriers=carriers,
        as_json=json,
        out=out,
    )
    if code := main(settings):
        raise typer.Exit(code)


def _chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    if text == "all":
        return known
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise usage(f"{option}: there is no {name!r}, only {', '.join(known)}")
    return names


def _install() -> None:
    from qvpn.bench.install import InstallError, install
    from qvpn.bench.run import say

    try:
        install(say)
    except InstallError as error:
        raise fail(f"qvpn bench: {error}") from None
