"""The configuration file of ``qvpn-kme``: TOML, checked whole before anything is opened.

:data:`EXAMPLE` shows every table; ``qvpn-kme example`` prints it.  Paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from keysource.etsi014.settings import check_sae
from keysource.settings import Address, Place, mistakes

EXAMPLE = """\
version = 1

[kme]
id = "kme-alice"                         # the common name of our certificate
listen = "192.0.2.1:8443"                # for SAEs: ETSI GS QKD 014; "[::1]:8443" for IPv6
peer_listen = "192.0.2.1:8444"           # for the other KME
certificate = "pki/kme-alice.crt"
private_key = "pki/kme-alice.key"        # mode 0600
ca = "pki/ca.crt"                        # the only authority whose SAEs and KMEs are believed
store = "state/kme.sqlite"               # in a folder of its own, mode 0700
# control = "state/control.sock"         # qvpn-kme status and fault; default: beside the store

[limits]                                 # all optional
# max_key_per_request = 128
# max_key_count = 100000                 # stored keys of a link; older free keys make room for new ones
# reserved_for = 86400                   # seconds that a reserved key waits for its slave SAE

[[peer_kme]]
id = "kme-bob"                           # the common name of its certificate
url = "https://192.0.2.2:8444"           # its peer_listen
saes = ["sae-bob"]                       # SAEs that are served there

[[link]]                                 # the QKD device at this end of the link to that KME
device = "link/device.sock"
peer_kme = "kme-bob"

[[sae]]
id = "sae-alice"                         # the common name of its certificate
may_share_with = ["sae-bob"]             # the other way round must stand at the other KME
"""


class ConfigError(Exception):
    """A wrong configuration file; the message names file, table and key."""


def _address(value: object) -> object:
    return Address.parse(value, lowest_port=0) if isinstance(value, str) else value


def _https(value: object) -> object:
    parts = urlsplit(str(value))
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError('it must be "https://HOST:PORT"')
    return str(value).rstrip("/")


def _sae_id(value: object) -> object:
    return check_sae(value) if isinstance(value, str) else value


ListenAddress = Annotated[Address, BeforeValidator(_address)]
"""``HOST:PORT`` of a listener; port 0 lets the system choose."""
Url = Annotated[str, BeforeValidator(_https)]
Name = Annotated[str, BeforeValidator(_sae_id)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Kme(_Table):
    id: Name
    listen: ListenAddress
    peer_listen: ListenAddress
    certificate: str
    private_key: str
    ca: str
    store: str
    control: str | None = None


class Limits(_Table):
    max_key_per_request: int = Field(default=128, ge=1, le=1024)
    max_key_count: int = Field(default=100_000, ge=1, le=10_000_000)
    reserved_for: int = Field(default=86_400, ge=10)


class PeerKme(_Table):
    id: Name
    url: Url
    saes: list[Name] = Field(min_length=1)


class Link(_Table):
    device: str
    peer_kme: Name


class Sae(_Table):
    id: Name
    may_share_with: list[Name] = Field(default_factory=list)


class KmeConfig(_Table):
    """The whole file; :meth:`path` knows its folder."""

    version: Literal[1]
    kme: Kme
    limits: Limits = Field(default_factory=Limits)
    peer_kme: list[PeerKme] = Field(min_length=1)
    link: list[Link] = Field(min_length=1)
    sae: list[Sae] = Field(min_length=1)
    _base: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _names_fit(self) -> KmeConfig:
        peers = [peer.id for peer in self.peer_kme]
        foreign = [sae for peer in self.peer_kme for sae in peer.saes]
        names = [self.kme.id, *peers, *foreign, *(sae.id for sae in self.sae)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands for two things; SAE and KME IDs are unique in the network")
        linked = [link.peer_kme for link in self.link]
        for peer in linked:
            if peer not in peers or linked.count(peer) > 1:
                raise ValueError(f"[[link]] peer_kme {peer!r} must be one [[peer_kme]], and each has one link")
        for sae in self.sae:
            for other in sae.may_share_with:
                if other not in foreign:
                    raise ValueError(f"[[sae]] {sae.id!r} may share with {other!r}, which no [[peer_kme]] serves")
        return self

    def path(self, value: str) -> Path:
        return self._base / value

    @property
    def control_path(self) -> Path:
        return self.path(self.kme.control) if self.kme.control else self.path(self.kme.store).parent / "control.sock"

    def local_sae(self, name: str) -> Sae | None:
        return next((sae for sae in self.sae if sae.id == name), None)

    def peer_of(self, sae: str) -> PeerKme | None:
        """The KME that serves a foreign SAE."""
        return next((peer for peer in self.peer_kme if sae in peer.saes), None)

    def peer(self, kme: str) -> PeerKme | None:
        return next((peer for peer in self.peer_kme if peer.id == kme), None)


def load(file: Path) -> KmeConfig:
    """Read and check a file.  Raises :class:`ConfigError`, one sentence per mistake, a line each."""
    try:
        table = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    try:
        config = KmeConfig.model_validate(table)
    except ValidationError as error:
        lines = [f"{file}: {_sentence(place, text)}" for place, text in mistakes(error)]
        raise ConfigError("\n".join(lines)) from None
    config._base = file.resolve().parent
    return config


def _sentence(where: Place, text: str) -> str:
    if not where:
        return text
    table, rest = str(where[0]), where[1:]
    if not rest:
        return f"{table}: {text}"
    if isinstance(rest[0], int):
        table, rest = f"[[{table}]] number {rest[0] + 1}", rest[1:]
    else:
        table = f"[{table}]"
    key = ".".join(str(part) for part in rest)
    return f"{table} {key}: {text}" if key else f"{table}: {text}"
