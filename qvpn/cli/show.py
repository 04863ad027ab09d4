"""``qvpn status`` and ``down``: ask a running daemon."""

from __future__ import annotations

import json as json_text
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qvpn import privileged, uapi
from qvpn.cli.output import fail
from qvpn.config.load import parse_config
from qvpn.config.units import show_duration
from qvpn.status import SCHEMA

STOP_TIMEOUT = 15.0
"""Seconds that ``down`` waits for the daemon's end."""

OptionalFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The site's qvpn.toml; without it every daemon of this user.")
]


def status(
    file: OptionalFile = None,
    json: Annotated[
        bool, typer.Option("--json", help="Versioned JSON: one site with FILE, else {sites: []}.")
    ] = False,
) -> None:
    """Show peers, epochs, key sources and counters of running daemons."""
    if json and file is None and not privileged.listed_sockets():
        print(json_text.dumps({"schema": SCHEMA, "sites": []}, indent=2))  # for a program, none is an answer
        return
    sites = [_site(path) for path in control_sockets(file)]
    if json:
        print(json_text.dumps(sites[0] if file is not None else {"schema": SCHEMA, "sites": sites}, indent=2))
        return
    print("\n\n".join(_show_site(site) for site in sites))


def down(file: OptionalFile = None) -> None:
    """Stop running daemons in order: peers are told, keys erased."""
    for path in control_sockets(file):
        uapi.ask(path, "stop")
        _wait_for_end(path)


def control_sockets(file: Path | None) -> list[Path]:
    """Of the daemon of that file, else of every daemon of this user."""
    if file is not None:
        config = parse_config(privileged.read_public(file), file)
        return [config.path(config.site.state) / "control.sock"]
    found = privileged.listed_sockets()
    if not found:
        raise fail(f"qvpn: no daemon of this user is listed in {privileged.run_folder()}; name its qvpn.toml")
    return found


def _site(path: Path) -> dict[str, Any]:
    answer = uapi.ask(path, "status").get("status")
    if not isinstance(answer, dict):
        raise uapi.UapiError(f"{path}: the daemon gave no status")
    return answer


def _wait_for_end(path: Path) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT
    while time.monotonic() < deadline:
        if not path.exists():
            return
        time.sleep(0.05)
    raise uapi.UapiError(f"{path}: the daemon was told to stop and still runs after {STOP_TIMEOUT:.0f} seconds")


# for people


def _show_site(site: dict[str, Any]) -> str:
    lines = [
        f"site {site['site']}  pid {site['pid']}  up {_span(site['uptime'])}  {site['listen']}  "
        f"{site['interface']} mtu {site['mtu']}",
        f"  fingerprint {site['fingerprint']}",
    ]
    for peer in site["peers"]:
        lines += _show_peer(peer)
    for source in site["key_sources"]:
        lines += _show_source(source)
    lines += [_show_lane(lane) for lane in site["lanes"]]
    lines += _show_queues(site["queues"])
    lines += _counters("drops", site["drops"]) + _counters("send errors", site["send_errors"])
    for name, counts in site["carriers"].items():
        lines += _counters(name, counts)
    return "\n".join(lines)


def _show_queues(queues: dict[str, Any]) -> list[str]:
    """What waited in front of the packet path; nothing where all was handled as it came."""
    if not queues or not (queues["longest"] or queues["received_longest"]):
        return []
    times = queues["marked"] + queues["received_marked"]
    return [
        f"waited at most {queues['longest'] * 1e3:.1f} ms to be sealed, {queues['received_longest'] * 1e3:.1f} ms "
        f"to be opened; told to slow down {times} times (ECN or drop); waiting now {queues['packets']}"
    ]


def _endpoint(peer: dict[str, Any]) -> str:
    """Where it is, and over which transport where there is a choice or it is not UDP."""
    if peer["endpoint"] is None:
        return "no endpoint"
    if peer["transports"] == ["udp"]:
        return str(peer["endpoint"])
    changes = f", {peer['carrier_changes']} changes" if len(peer["transports"]) > 1 else ""
    return f"{peer['endpoint']} over {peer['carrier']}{changes}"


def _show_peer(peer: dict[str, Any]) -> list[str]:
    epoch = peer["epoch"]
    lines = [f"peer {peer['name']}: {peer['state'].upper()}  policy {peer['policy']}  {_endpoint(peer)}"]
    if peer["simulated"]:
        lines.append(f"  {peer['simulated']}")
    if epoch is not None:
        lines.append(
            f"  epoch {epoch['number']} ({epoch['state']}, {epoch['role']})  age {_span(epoch['age'])}  "
            f"next rekey in {_span(epoch['next_rekey_in'])}  hard end in {_span(epoch['hard_end_in'])}"
        )
        if epoch["key_id_hash"]:
            lines.append(f"  key {epoch['key_id_hash']} from {epoch['origin']}")
    lines.append(
        f"  rekeys {peer['rekeys']}  keys used {peer['keys_used']}  last handshake {_ago(peer['last_handshake'])}  "
        f"last received {_ago(peer['last_received'])}"
    )
    lines.append(
        f"  sent {peer['sent_packets']} packets, {peer['sent_bytes']} bytes  "
        f"received {peer['received_packets']} packets, {peer['received_bytes']} bytes"
    )
    if (path := peer.get("path")) is not None:
        lines.append(
            f"  path mtu {path['mtu']} ({path['found']}), {path['inner_mtu']} inside, link {path['link_mtu']}"
        )
    for count, last in (("failures", "last_failure"), ("alarms", "last_alarm")):
        if peer[count]:
            lines.append(f"  {count} {peer[count]}, last: {peer[last]}")
    lines += _counters("drops", peer["drops"])
    for lane in peer["lanes"]:
        lines.append(
            f"  lane {lane['number']} {'up' if lane['up'] else 'down'}  {lane['endpoint'] or 'no endpoint'}  "
            f"sent {lane['sent_packets']} packets, {lane['sent_bytes']} bytes  "
            f"received {lane['received_packets']} packets, {lane['received_bytes']} bytes"
        )
        lines += ["  " + line for line in _counters("drops", lane["drops"])]
    return lines


def _show_lane(lane: dict[str, Any]) -> str:
    state = ("in use" if lane["used"] else "no peer to send to") if lane["up"] else "not running"
    facts = [f"lane {lane['number']}: {state}", f"port {lane['port']}"]
    if lane["pid"] is not None:
        facts.append(f"pid {lane['pid']}")
    if lane["restarts"]:
        facts.append(f"restarts {lane['restarts']}, last: {lane['reason']}")
    return "  ".join(facts)


def _show_source(source: dict[str, Any]) -> list[str]:
    state = "ready" if source["ready"] else f"not ready: {source['reason']}"
    facts = [f"origin {source['origin'] or 'unknown'}", f"hop {source['hop']}"]
    if source["stored_keys"] is not None:
        lasts = "" if source["lasts"] is None else f", {_span(source['lasts'])} at this rekey rate"
        facts.append(f"{source['stored_keys']} keys stored{lasts}")
    if source["key_rate"] is not None:
        facts.append(f"{source['key_rate']:.2f} keys/s")
    if source["qber"] is not None:
        facts.append(f"QBER {source['qber']:.2%}")
    if source["restarts"]:
        facts.append(f"restarts {source['restarts']}")
    if not source["survives_harvest"]:
        facts.append("its last hop can be recorded now and read later")
    lines = [f"key source {source['name']} ({source['type']}): {state}", "  " + "  ".join(facts)]
    return [*lines, f"  ALARM {source['alarm']}"] if source["alarm"] else lines


def _counters(name: str, counts: dict[str, int]) -> list[str]:
    return [f"  {name} " + "  ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))] if counts else []


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else show_duration(round(seconds))


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{show_duration(round(seconds))} ago"
