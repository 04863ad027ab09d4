"""Measurements between two namespaces of a lab: the programs of :mod:`qvpn.demo.traffic` started in pairs."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from qvpn.demo.lab import Lab
from qvpn.demo.process import Process, module

_TRAFFIC = "qvpn.demo.traffic"


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True)
class Loss:
    """Both directions of a :class:`Load` together; ``missing`` names the first lost numbers by sender."""

    sent: int
    received: int
    duplicates: int
    refused: int
    reordered: int
    longest_gap: float
    """Seconds between two neighbouring arrivals, the worse of both ends."""
    missing: dict[str, list[int]]
    socket_drops: int
    """Arrived, but the measuring program was too slow; not the tunnel's loss, so there must be none."""

    @property
    def lost(self) -> int:
        return self.sent - self.received


class Load:
    """Numbered UDP packets in both directions between two addresses, from :meth:`begin` to :meth:`finish`."""

    def __init__(
        self,
        lab: Lab,
        addresses: dict[str, str],
        marker: bytes,
        *,
        rate: float = 1000.0,
        size: int = 256,
        port: int = 9000,
        report: float = 0.0,
        linger: float = 1.0,
        name: str = "load",
    ) -> None:
        self._sites = list(addresses)
        self._ends: dict[str, Process] = {}
        for here, there in (self._sites, self._sites[::-1]):
            ends = ["--bind", _at(addresses[here], port), "--peer", _at(addresses[there], port)]
            command = module(
                _TRAFFIC, "udp", "--hold", *ends,
                "--rate", str(rate), "--size", str(size), "--marker", marker.hex(),
                "--report", str(report), "--linger", str(linger),
            )  # fmt: skip
            self._ends[here] = lab[here].start(name, command)

    def begin(self, timeout: float = 15.0) -> None:
        """Start sending, once both ends listen."""
        for end in self._ends.values():
            end.until_output(timeout)
        for end in self._ends.values():
            end.signal(signal.SIGUSR1)

    def counts(self) -> dict[str, dict[str, Any]]:
        """The last reported counts of each end (needs ``report``)."""
        return {site: end.lines()[-1] for site, end in self._ends.items()}

    def finish(self, timeout: float = 15.0) -> Loss:
        """Stop sending, let what is under way arrive, and compare the two ends."""
        for end in self._ends.values():
            end.signal(signal.SIGTERM)
        results = {site: end.result(timeout) for site, end in self._ends.items()}
        left, right = self._sites
        both = list(results.values())
        return Loss(
            sent=sum(end["sent"] for end in both),
            received=sum(end["received"] for end in both),
            duplicates=sum(end["duplicates"] for end in both),
            refused=sum(end["refused"] for end in both),
            reordered=sum(end["reordered"] for end in both),
            longest_gap=max(end["longest_gap"] for end in both),
            missing={left: results[right]["missing_below_highest"], right: results[left]["missing_below_highest"]},
            socket_drops=sum(end["socket_drops"] for end in both),
        )


def ping(
    lab: Lab, site: str, peer: str, *, count: int = 5, interval: float = 0.05, timeout: float = 2.0
) -> dict[str, Any]:
    """ICMP echo from a site to an address; see :func:`qvpn.demo.echo.ping` for the result."""
    command = module(
        _TRAFFIC,
        "ping",
        "--peer",
        peer,
        "--count",
        str(count),
        "--interval",
        str(interval),
        "--timeout",
        str(timeout),
    )
    return lab[site].start("ping", command).result(count * interval + timeout + 10)


@dataclass(frozen=True)
class Transfer:
    """A TCP transfer as both ends saw it."""

    bytes: int
    seconds: float
    bits_per_second: int
    same_hash: bool


def transfer(
    lab: Lab,
    source: str,
    sink: str,
    address: str,
    marker: bytes,
    *,
    total: int,
    port: int = 7000,
    timeout: float = 60.0,
) -> Transfer:
    """Send ``total`` bytes over TCP to ``address`` at site ``sink``; ProcessFailed where it does not come through."""
    patience = str(timeout)
    receiver = lab[sink].start(
        "tcp-sink", module(_TRAFFIC, "tcp-sink", "--bind", _at(address, port), "--timeout", patience)
    )
    receiver.until_output(15)
    sender = lab[source].start(
        "tcp-source",
        module(
            _TRAFFIC, "tcp-source", "--peer", _at(address, port), "--bytes", str(total),
            "--marker", marker.hex(), "--timeout", patience,
        ),
    )  # fmt: skip
    sent = sender.result(timeout + 15)
    received = receiver.result(15)
    return Transfer(
        bytes=received["bytes"],
        seconds=received["seconds"],
        bits_per_second=received["bits_per_second"],
        same_hash=received["sha256"] == sent["sha256"] and received["bytes"] == sent["bytes"] == total,
    )


def start_capture(
    lab: Lab,
    site: str,
    interface: str,
    marker: bytes,
    *,
    inner: tuple[str, ...] = (),
    port: int | None = None,
    name: str = "capture",
) -> Process:
    """Start listening on an interface; ``Process.finish()`` gives the counts of :mod:`qvpn.demo.capture`."""
    options = ["--interface", interface, "--marker", marker.hex()]
    for network in inner:
        options += ["--inner", network]
    if port is not None:
        options += ["--port", str(port)]
    capture = lab[site].start(name, module("qvpn.demo.capture", *options))
    capture.until_output(15)
    return capture
