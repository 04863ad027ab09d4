"""The daemon's own counters must add up, or the run's figures are worth nothing.

A packet path that skipped a check would be faster.  So after every run of ours both daemons are asked, and

- each counter *marked* in a replay window belongs to one datagram that was *opened*, and the reverse;
- each packet or superpacket whose inner *source was checked* was *written* to the TUN, or refused by it and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvpn.bench.errors import Unbalanced

COUNTS = ("opened", "marked", "source_checks", "tun_writes", "tun_refused")


def counts(status: Mapping[str, Any]) -> dict[str, int]:
    """The counts of one daemon's status, summed over its peers.  Raises Unbalanced where one is not told."""
    total = dict.fromkeys(COUNTS, 0)
    for peer in status["peers"]:
        for name in COUNTS:
            if name not in peer:
                raise Unbalanced(f"{status['site']}: its status does not tell {name!r}")
            total[name] += peer[name]
    return total


def check(site: str, found: Mapping[str, int]) -> None:
    """Raises Unbalanced with the numbers if they do not add up, or if nothing was counted at all."""
    if not found["opened"] or not found["tun_writes"]:
        raise Unbalanced(f"{site}: no datagram was opened or nothing was written to the TUN: {dict(found)}")
    if found["marked"] != found["opened"]:
        raise Unbalanced(
            f"{site}: {found['marked']} counters marked in replay windows, but {found['opened']} datagrams opened"
        )
    if found["source_checks"] != found["tun_writes"] + found["tun_refused"]:
        raise Unbalanced(
            f"{site}: {found['source_checks']} sources checked, but {found['tun_writes']} packets and superpackets "
            f"written to the TUN and {found['tun_refused']} refused by it"
        )
