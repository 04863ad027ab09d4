"""What a node answers when it is asked how it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keysource.device.server import DeviceServer
from keysource.network.node import RelayNode


def links(node: RelayNode) -> list[dict[str, Any]]:
    """Its links, with the units that it has for both directions."""
    core, found = node.core, []
    for name, state in core.links.items():
        stored = core.store.link(name)
        found.append(
            {
                "name": name,
                "to": state.entry.other(core.name),
                "up": state.up,
                "trouble": state.trouble,
                "alarm": state.alarm or None,
                "behind": state.behind,
                "qber": state.qber,
                "key_rate": state.key_rate,
                "own_units": stored.own if stored else 0,
                "peer_units": stored.peers if stored else 0,
            }
        )
    return found


def connections(node: RelayNode, devices: Mapping[str, DeviceServer], now: float) -> list[dict[str, Any]]:
    """Those that end here, by name of their device sockets."""
    core, found = node.core, []
    for name, device in devices.items():
        initiator = node.initiators.get(name)
        known = initiator or node.targets[name]
        found.append(
            {
                "name": name,
                "to": known.connection.other(core.name),
                "begins": initiator is not None,
                "state": initiator.state if initiator else "target",
                "trouble": initiator.trouble if initiator else "",
                "paths": initiator.paths if initiator else (),
                "keys_per_second": round(initiator.rate(now), 3) if initiator else None,
                "next_block": core.store.last(name)[0],
                "waiting_blocks": device.status().blocks_held,
            }
        )
    return found
