"""``qvpn demo``: outside, start ourselves in a sandbox; inside, set the scene, run the acts and tell of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from qvpn.control.mistakes import describe
from qvpn.demo import sandbox
from qvpn.demo.process import module

_FOLDER = Path("/run/qvpn-demo")
_JSON = "--json"


def main(json: bool = False, transport: str = "udp") -> int:
    """Run the whole demo; returns 0 only if every step held.  Everything it makes is gone when this returns."""
    options = [transport, *([_JSON] if json else [])]
    try:
        return sandbox.run(module("qvpn.demo.run", *options))
    except sandbox.SandboxError as error:
        print(f"qvpn demo: {error}", file=sys.stderr)
        return 1


def _inside(transport: str, as_json: bool) -> int:
    # Imported here: the outer process needs none of it.
    from qvpn.demo import report
    from qvpn.demo.acts import Acts
    from qvpn.demo.lab import two_sites
    from qvpn.demo.scene import HARD_END, REKEY, Scene
    from qvpn.demo.steps import Script

    start = time.monotonic()
    teller = report.teller(as_json=as_json)
    teller.say("qvpn demo: site alice, site bob, an untrusted network, a simulated QKD link, two KMEs, four daemons.")
    teller.say("The link is simulated, so nothing here has quantum security; every mechanism is the real one.")
    teller.say("The sites reach each other over UDP." if transport == "udp" else "All of it travels inside QUIC.")
    teller.say(f"For the demo keys live short: rekey every {REKEY:g} s, hard end after {HARD_END:g} s.")
    with two_sites(_FOLDER) as lab:
        scene = Scene(lab, transport)
        acts = Acts(scene)
        script = Script(teller, scene.tails)
        for name, title, body, ground in acts.all():
            script.run(name, title, body, ground=ground)
        seconds = time.monotonic() - start
        if as_json:
            print(report.as_json(script, acts.totals, seconds), flush=True)
        else:
            teller.summary(script, acts.totals, seconds)
    return 0 if script.all_held else 1


def _work() -> int:
    try:
        return _inside("quic" if "quic" in sys.argv[1:] else "udp", _JSON in sys.argv[1:])
    except BrokenPipeError:
        # Whoever read our output went away; nothing more is to be said, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("QVPN_DEBUG") == "1":
            raise
        print(f"qvpn demo: {_why(error)}", file=sys.stderr)
        return 1


def _why(error: Exception) -> str:
    """One sentence for what went wrong outside of the steps: mostly a kernel that lacks something."""
    from pyroute2.netlink.exceptions import NetlinkError

    if isinstance(error, NetlinkError):
        return f"the kernel refuses a link, an address or a route of the demo: {error.args[-1]}"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
    facts = describe(error)
    return f"internal error: {facts['error']} in {facts['place']}; QVPN_DEBUG=1 shows the details"


if __name__ == "__main__":
    sys.exit(sandbox.body(_work))
