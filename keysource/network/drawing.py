"""A network for people: tables of one node, and the map as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table


def status_tables(said: dict[str, Any]) -> Iterator[Table]:
    """What ``network status`` prints of a node's answer."""
    links = Table("link", "to", "state", "QBER", "units to send", "units to receive", title=f"node {said['node']}")
    for link in said["links"]:
        state = f"ALARM {link['alarm']}" if link["alarm"] else "up" if link["up"] else f"down: {link['trouble']}"
        if link["behind"]:
            state = "STOPPED: the store is older than what the other end saw of it; set up the link anew"
        qber = "" if link["qber"] is None else f"{100 * link['qber']:.2f} %"
        links.add_row(link["name"], link["to"], escape(state), qber, str(link["own_units"]), str(link["peer_units"]))
    yield links
    if said["connections"]:
        table = Table("connection", "to", "state", "paths", "keys/s", "next block", "trouble")
        for one in said["connections"]:
            paths = "\n".join(" > ".join(path) for path in one["paths"])
            rate = "" if one["keys_per_second"] is None else f"{one['keys_per_second']:.2f}"
            state = one["state"]
            table.add_row(one["name"], one["to"], state, paths, rate, str(one["next_block"]), escape(one["trouble"]))
        yield table
