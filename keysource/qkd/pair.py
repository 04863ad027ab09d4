"""Write the files of a link: one folder per end, and one for the fibre where it is a process of its own.

The pad is made once and copied into both ends' folders; carry the right end's folder over a way that you trust, and
destroy other copies.

With ``bootstrap = "signature"`` there is no pad: each folder gets an identity and the other end's public keys.
Better still, each site makes its own identity (``qvpn genkey``) and only the ``.pub`` travels, by a way that nobody
changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keysource.base import Owner
from keysource.private import create_private
from keysource.qkd.config import Bootstrap, Pace
from keysource.qkd.errors import LinkSettings
from keysource.qkd.identity import generate
from keysource.qkd.pad import DEFAULT_PAD_BYTES, link_key, make_pad
from keysource.settings import Address


@dataclass(frozen=True, slots=True)
class PairPlan:
    """What both ends are told.  ``classical`` and ``fibre`` are addresses on the left host, as the right host sees
    them; with ``separate_fibre`` the fibre runs elsewhere, at ``fibre``."""

    classical: Address
    fibre: Address
    name: str | None = None
    left: str = "alice"
    right: str = "bob"
    preset: str = "demo"
    pace: Pace = "realtime"
    owner: Owner = Owner.ALTERNATE
    separate_fibre: bool = False
    bootstrap: Bootstrap = "psk"
    pad_bytes: int = DEFAULT_PAD_BYTES
    file: str = "link.toml"


def write_pair(folder: Path, plan: PairPlan) -> list[Path]:
    """Write the folders ``left``, ``right`` (and ``fibre``); the configuration files written are returned.

    Existing folders are used, existing files never replaced.

    Raises:
        LinkSettings: a file exists already, or cannot be written.
    """
    if plan.bootstrap == "signature" and plan.separate_fibre:
        raise LinkSettings("a fibre of its own has its key from a couriered pad: it does not go with signatures")
    pad = make_pad(plan.pad_bytes)
    secrets = _secrets(plan, pad)
    written = []
    try:
        for site, text, files in zip((plan.left, plan.right), (_left(plan), _right(plan)), secrets, strict=True):
            written.append(_write(folder / site, plan.file, text, files))
        if plan.separate_fibre:
            key = link_key(pad, b"fibre")
            written.append(_write(folder / "fibre", plan.file, _fibre(plan), {"fibre.key": key}))
    except FileExistsError as error:
        raise LinkSettings(f"{error.filename}: exists already; nothing is replaced") from None
    except OSError as error:
        raise LinkSettings(f"{error.filename}: {error.strerror}") from None
    return written


def _secrets(plan: PairPlan, pad: bytes) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What each end's folder gets beside its configuration."""
    if plan.bootstrap == "psk":
        return {"auth.pad": pad}, {"auth.pad": pad}
    left, right = generate(), generate()
    return (
        {"identity.pem": left.pem(), "identity.pub": left.public.pem(), "peer.pub": right.public.pem()},
        {"identity.pem": right.pem(), "identity.pub": right.public.pem(), "peer.pub": left.public.pem()},
    )


def _write(folder: Path, name: str, text: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file, data in files.items():
        create_private(folder / file, data)
    create_private(folder / name, text.encode())
    return folder / name


def _common(plan: PairPlan) -> str:
    chosen = plan.name or (f"{plan.left}-{plan.right}" if plan.bootstrap == "signature" else None)
    name = f'name = "{chosen}"\n' if chosen else ""
    return f'{name}preset = "{plan.preset}"             # the same at both ends and the fibre\n'


def _files(plan: PairPlan) -> str:
    key = 'auth_key = "auth.pad"           # one-time authentication key; both ends have the same file'
    if plan.bootstrap == "signature":
        key = """auth_bootstrap = "signature"    # no couriered key: the first block is signed, which is computational
identity = "identity.pem"       # stays here
peer_identity = "peer.pub"      # the other end's; compare fingerprints: qvpn-qkd check"""
    return f"""owner = "{plan.owner.value}"
{key}
state = "link-state"            # never restore it from a backup
socket = "device.sock"          # where the KME or the tunnel gets the keys
"""


def _left(plan: PairPlan) -> str:
    spawn = "false" if plan.separate_fibre else "true"
    control = "" if plan.separate_fibre else 'control = "eve.sock"            # qvpn-qkd eve FILE on|off\n'
    pace = "" if plan.separate_fibre else f'pace = "{plan.pace}"\n'
    return f"""# End a (Alice) of a simulated QKD link: no quantum security.  Run: qvpn-qkd run {plan.file}
version = 1
role = "left"
listen = "{plan.classical}"     # the classical channel; Bob connects here
fibre = "{plan.fibre}"
spawn_fibre = {spawn}
{_common(plan)}{pace}{_files(plan)}{control}"""


def _right(plan: PairPlan) -> str:
    return f"""# End b (Bob) of a simulated QKD link: no quantum security.  Run: qvpn-qkd run {plan.file}
version = 1
role = "right"
peer = "{plan.classical}"
fibre = "{plan.fibre}"
{_common(plan)}{_files(plan)}"""


def _fibre(plan: PairPlan) -> str:
    return f"""# The fibre of a simulated QKD link: whoever reads it has every key.  Run: qvpn-qkd run {plan.file}
version = 1
role = "fibre"
listen = "{plan.fibre}"
preset = "{plan.preset}"
pace = "{plan.pace}"
control = "eve.sock"            # qvpn-qkd eve FILE on|off
key = "fibre.key"               # seals what the ends tell the fibre
"""
