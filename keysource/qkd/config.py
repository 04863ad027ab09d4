"""The file that ``qvpn-qkd run`` reads: one process, one file, all keys at the top level.

::

    version = 1
    role = "left"                     # left is Alice, right is Bob; "fibre" is a fibre process of its own
    name = "alice-bob"                # optional; both ends the same; default: made from the pad
    listen = "192.0.2.1:51850"        # left only: where Bob connects for the classical channel
    peer = "192.0.2.1:51850"          # right only: Alice's `listen`
    fibre = "192.0.2.1:51851"         # where the fibre process listens; default: next port of Alice's `listen`
    spawn_fibre = true                # left only: run the fibre as a child
    preset = "demo"                   # see `qvpn-qkd presets`; the same everywhere
    protocol = "bb84-1decoy"          # bb84-1decoy | bb84-2decoy | bbm92 | e91: the preset's variant of that name;
                                      # default: the preset's own.  The same everywhere
    pace = "realtime"                 # realtime: pulses take as long as on the real link; fast: as quick as we can;
                                      # left with spawn_fibre, or fibre: the other end learns it from the fibre
    owner = "alternate"               # alternate | a | b: who issues keys; both ends the same
    auth_bootstrap = "psk"            # psk: a pad that somebody carried to both ends; signature: none, and blocks
                                      # are signed until the link has made one-time key.  Both ends the same
    auth_key = "auth.pad"             # psk only: the pad file, 0600; each end its own copy
    identity = "identity.pem"         # signature only: this end's key file, 0600 (qvpn genkey); and `name`, see above
    peer_identity = "peer.pub"        # signature only: the other end's public keys (qvpn pubkey)
    state = "state"                   # folder, 0700; never restore it from a backup
    socket = "device.sock"            # the device socket
    monitor = "photocurrent"          # none | photocurrent | efficiency | both: guards of the detectors.  Gates that
                                      # test the efficiency are in the plan of a block: both ends say so, or none.
                                      # Alice has detectors on a link of pairs only, and guards them then
    error_limit = 1e-3                # the link stops before the errors of all its blocks together pass this
    qrng = "/dev/qrng0"              # a quantum random number generator to mix in: device, FIFO or socket
    qrng_entropy = 4.0                # with qrng: min-entropy in bits that its maker claims of a raw byte
    test_seed = "any words"           # for tests: choices repeat, and no key is delivered; both ends
    front_end = "fibre"               # fibre | recorded | live: where settings and detections come from
    records = "runs"                  # recorded: folder; live: the device's socket (engine.frontends)
    control = "eve.sock"              # left with spawn_fibre, or fibre: where Eve is switched; default in `state`

A fibre process of its own has ``version, role, listen, preset, protocol, pace, control, key`` (``fibre.key``, 32
bytes, made by ``qvpn-qkd pair``).  Paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from keysource.base import End, Owner
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.monitors import Monitor
from keysource.qkd.presets import PRESETS, variant
from keysource.qkd.rates.proofs import Protocol
from keysource.settings import Address as Address  # the engine takes it from here
from keysource.settings import AddressText, first_mistake
from keysource.sockets import path_mistake


def _preset(text: str) -> str:
    if text not in PRESETS:
        raise ValueError(f"{text!r} is none of {', '.join(PRESETS)}")
    return text


PresetName = Annotated[str, AfterValidator(_preset)]
LinkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Pace = Literal["realtime", "fast"]
FrontEndName = Literal["fibre", "recorded", "live"]
Bootstrap = Literal["psk", "signature"]


_OF_OWN_FIBRE = ("pace", "control")
_NOT_OF_LEFT = ("peer",)
_NOT_OF_RIGHT = ("listen", "spawn_fibre", *_OF_OWN_FIBRE)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


_Model = TypeVar("_Model", bound=_Table)


class EndSettings(_Table):
    """Alice's or Bob's file."""

    version: Literal[1]
    role: Literal["left", "right", "alice", "bob"]
    name: LinkName | None = None
    listen: AddressText | None = None
    peer: AddressText | None = None
    fibre: AddressText | None = None
    spawn_fibre: bool = True
    preset: PresetName = "demo"
    protocol: Protocol | None = None
    pace: Pace = "realtime"
    owner: Owner = Owner.ALTERNATE
    auth_bootstrap: Bootstrap = "psk"
    auth_key: str | None = None
    identity: str | None = None
    peer_identity: str | None = None
    state: str
    socket: str
    control: str | None = None
    monitor: Monitor = "photocurrent"
    front_end: FrontEndName = "fibre"
    records: str | None = None
    error_limit: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-3
    qrng: str | None = None
    qrng_entropy: Annotated[float, Field(gt=0.0, le=8.0)] | None = None
    test_seed: Annotated[str, Field(min_length=1)] | None = None


class FibreSettings(_Table):
    """The file of a fibre process of its own."""

    version: Literal[1]
    role: Literal["fibre"]
    listen: AddressText
    preset: PresetName = "demo"
    protocol: Protocol | None = None
    pace: Pace = "realtime"
    control: str
    key: str


@dataclass(frozen=True, slots=True)
class EndConfig:
    """An end, resolved.  ``classical`` is where Alice listens and Bob connects."""

    end: End
    name: str | None
    classical: Address
    fibre: Address
    spawn_fibre: bool
    preset: str
    pace: Pace
    owner: Owner
    auth_key: Path
    state: Path
    socket: Path
    control: Path | None
    """None where the default path is too long for a unix socket."""
    monitor: Monitor = "photocurrent"
    front_end: FrontEndName = "fibre"
    records: Path | None = None
    """Set where ``front_end`` is not the fibre."""
    error_limit: float = 1e-3
    identities: tuple[Path, Path] | None = None
    """(ours, private; the other end's, public) where the first block is signed; ``auth_key`` is then made here."""

    qrng: tuple[Path, float] | None = None
    """(generator, min-entropy of its samples in bits)."""
    test_seed: str | None = None
    """Set in the deterministic test mode."""

    @property
    def tests(self) -> bool:
        """Do some of Bob's gates test the efficiency of his detectors (with pairs some of Alice's, too)?"""
        return self.monitor in ("efficiency", "both")


@dataclass(frozen=True, slots=True)
class FibreConfig:
    """A fibre process of its own."""

    listen: Address
    preset: str
    pace: Pace
    control: Path
    key: Path


def load(path: Path) -> EndConfig | FibreConfig:
    """Read a configuration.  Raises :class:`LinkSettings` with file and key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LinkSettings(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:  # its text quotes a byte, of a secret file perhaps
        raise LinkSettings(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise LinkSettings(f"{path}: not TOML: {error}") from None
    base = path.absolute().parent
    if raw.get("role") == "fibre":
        table = _checked(FibreSettings, raw, path)
        listen = Address.parse(table.listen)
        return FibreConfig(listen, _variant(table, path), table.pace, base / table.control, base / table.key)
    return _resolve(_checked(EndSettings, raw, path), path, base)


def _checked(model: type[_Model], raw: dict[str, object], path: Path) -> _Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        key, text = first_mistake(error)
        raise LinkSettings(f'{path}: top level, key "{key}": {text}') from None


def _resolve(table: EndSettings, path: Path, base: Path) -> EndConfig:
    left = table.role in ("left", "alice")
    given, key = (table.listen, "listen") if left else (table.peer, "peer")
    if given is None:
        raise LinkSettings(f'{path}: top level, key "{key}": role "{table.role}" needs it')
    for key in _NOT_OF_LEFT if left else _NOT_OF_RIGHT:
        if key in table.model_fields_set:
            raise LinkSettings(f'{path}: top level, key "{key}": has no effect at role "{table.role}"; take it out')
    if left and not table.spawn_fibre:
        _refuse_fibre_settings(table, path)
    device = table.front_end != "fibre"
    if device != (table.records is not None):
        need = f'front_end "{table.front_end}" ' + ("needs it" if device else "has no records")
        raise LinkSettings(f'{path}: top level, key "records": {need}')
    auth_key, identities = _authentication(table, path, base)
    classical, preset = Address.parse(given), _variant(table, path)
    state = base / table.state
    return EndConfig(
        end=End.A if left else End.B,
        name=table.name,
        classical=classical,
        fibre=Address.parse(table.fibre) if table.fibre else classical.next_port(),
        spawn_fibre=left and table.spawn_fibre and not device,
        preset=preset,
        pace=table.pace,
        owner=table.owner,
        auth_key=auth_key,
        identities=identities,
        state=state,
        socket=base / table.socket,
        control=base / table.control if table.control else _short(state / "eve.sock"),
        monitor=table.monitor,
        front_end=table.front_end,
        error_limit=table.error_limit,
        qrng=_qrng(table, path, base),
        test_seed=table.test_seed,
        records=None if table.records is None else base / table.records,
    )


def _qrng(table: EndSettings, path: Path, base: Path) -> tuple[Path, float] | None:
    if (table.qrng is None) != (table.qrng_entropy is None):
        raise LinkSettings(f'{path}: top level, key "qrng_entropy": belongs to qrng, and qrng needs it')
    if table.qrng is not None and table.test_seed is not None:
        raise LinkSettings(f'{path}: top level, key "test_seed": has no place beside qrng')
    return None if table.qrng is None or table.qrng_entropy is None else (base / table.qrng, table.qrng_entropy)


def _authentication(table: EndSettings, path: Path, base: Path) -> tuple[Path, tuple[Path, Path] | None]:
    """(pad file, key files where there is no couriered pad)."""
    signed = table.auth_bootstrap == "signature"
    for key, wanted in (("auth_key", not signed), ("identity", signed), ("peer_identity", signed), ("name", signed)):
        if wanted and getattr(table, key) is None:
            need = f'is required with auth_bootstrap = "{table.auth_bootstrap}"'
            raise LinkSettings(f'{path}: top level, key "{key}": {need}')
        if not wanted and key != "name" and getattr(table, key) is not None:
            raise LinkSettings(
                f'{path}: top level, key "{key}": has no place beside auth_bootstrap = "{table.auth_bootstrap}"'
            )
    if not signed:
        return base / str(table.auth_key), None
    if table.role in ("left", "alice") and not table.spawn_fibre and table.front_end == "fibre":
        raise LinkSettings(
            f'{path}: top level, key "spawn_fibre": a fibre of its own has its key from a couriered pad;'
            ' with auth_bootstrap = "signature" it is a child of the left end'
        )
    return base / table.state / "head", (base / str(table.identity), base / str(table.peer_identity))


def _variant(table: EndSettings | FibreSettings, path: Path) -> str:
    try:
        return variant(table.preset, table.protocol)
    except ValueError as error:
        raise LinkSettings(f'{path}: top level, key "protocol": {error}') from None


def _refuse_fibre_settings(table: EndSettings, path: Path) -> None:
    for key in _OF_OWN_FIBRE:
        if key in table.model_fields_set:
            raise LinkSettings(
                f'{path}: top level, key "{key}": belongs to the fibre, another process (spawn_fibre = false)'
            )


def _short(path: Path) -> Path | None:
    return None if path_mistake(path) else path
