"""The KMEs' nursery (``tests.kme.nursery``) for nodes, which have a sixth of their patience here.

What a node waits for after a crash it waits for in the same order and with the same proportions; the 50 kills of a
point then take minutes instead of an hour.
"""

from __future__ import annotations

from keysource.network import (
    cli,  # noqa: F401  (adds the commands)
    initiator,
    process,  # noqa: F401  (imported for the forks)
    relay,
    stocks,
    target,
)
from tests.kme import nursery

_FASTER = 6
_PATIENCE = {
    initiator: ("GIVE_UP", "RESEND", "SHUN_ALTERED", "SHUN_LATE", "SHUN_LINK", "_PAUSE", "_LONGEST_PAUSE"),
    relay: ("HOP_RETRY", "KEPT", "LACKING_WAIT"),
    stocks: ("ASK_EVERY",),
    target: ("ARRIVAL", "DECIDED", "RESEND"),
}


def main() -> None:
    for module, names in _PATIENCE.items():
        for name in names:
            setattr(module, name, getattr(module, name) / _FASTER)
    nursery.main()


if __name__ == "__main__":
    main()
