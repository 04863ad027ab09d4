"""The configuration file of ``qvpn-kme``: TOML, checked whole before anything is opened.

:data:`EXAMPLE` shows every table; ``qvpn-kme example`` prints it.  Paths are relative to the file.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from keysource.etsi014.settings import check_sae
from keysource.kme.records import UNIT_BITS
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
# audit = "state/audit.jsonl"            # who got which key and when; default: beside the store
# skip_listen = "192.0.2.1:8445"         # for encryptors that speak Cisco's SKIP (TLS 1.3); default: not served
# site_key = "site.key"                  # wraps what is stored: a 0600 file, or "credential:NAME" of the systemd
                                         # service; default: one beside the store, which a thief of the disk gets too
# epoch_keys = "state/kme.sqlite.epochs" # keys under the site key, overwritten as they retire; never back it up;
                                         # with PostgreSQL a part of each, for processes of one host; default: none
# sae_id_from = "cn"                     # where an SAE's certificate has its SAE ID: "cn", or "san-uri"
# sae_id_prefix = ""                     # what such a URI begins with, left out of the SAE ID: "urn:example:sae:"

# [store]                                # instead of an SQLite file: a database for all KME processes of the site
# kind = "postgresql"                    # needs qvpn[postgres], and a site_key that all the processes have
# conninfo = "host=10.0.0.5,10.0.0.6 dbname=qvpn user=qvpn sslmode=verify-full sslrootcert=/etc/qvpn/db-ca.crt"
# password = "credential:database"       # 0600 file or credential, never in conninfo
# require_standby = true                 # false: serve without a synchronous standby; a failover may repeat keys
# synchronous_commit = "on"              # or "remote_apply"
# connections = 4                        # of this process
# timeout = 2.0                          # seconds for one transaction; then 503

[limits]                                 # all optional
# max_key_per_request = 128
# max_key_count = 100000                 # stored keys of a link; older free keys make room for new ones
# reserved_for = 86400                   # seconds that a reserved key waits for its slave SAE
# key_size = 256                         # bits of a key where nobody says a size; all three are multiples of 8
# min_key_size = 64
# max_key_size = 4096                    # a key costs whole units of 256 bits of the link
# max_SAE_ID_count = 8                   # additional slaves of one key; 0: no multicast
# requests_per_second = 100.0            # of one SAE; 0: as many as it likes
# burst = 1000                           # requests that it may make at once after a rest
# keys_per_second = 0.0                  # of 256 bits, that one SAE may draw as master; 0: as many as there are
# refuse_unhandled_optional = false      # true: an extension_optional that we do not know is refused
# key_epoch = 3600                       # seconds after which stored keys are wrapped anew
# unauthenticated_connections = 1024     # of a listener, that have not shown a certificate yet
# unauthenticated_per_address = 256      # of those, from one IPv4 address or one IPv6 /64
# handshake_timeout = 10.0               # seconds that TLS may take until the certificate is there
# connections_per_sae = 128              # that one SAE (or other KME) may have open at a listener

[[peer_kme]]
id = "kme-bob"                           # the common name of its certificate
url = "https://192.0.2.2:8444"           # its peer_listen
saes = ["sae-bob"]                       # SAEs that are served there

[[link]]                                 # the QKD device at this end of the link to that KME
device = "link/device.sock"
peer_kme = "kme-bob"
# name = "second fibre"                  # where several [[link]]s lead to one KME: of all but one; never change it

[[sae]]
id = "sae-alice"                         # the common name of its certificate
may_share_with = ["sae-bob"]             # the other way round must stand at the other KME
# requests_per_second = 100.0            # for this one instead of [limits]; so are burst and keys_per_second
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
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]
"""Per second; 0 stands for no limit."""
MAX_UNITS = 4096
"""Of 256 bits, that one request may take."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Kme(_Table):
    id: Name
    listen: ListenAddress
    peer_listen: ListenAddress
    certificate: str
    private_key: str
    ca: str
    store: str = "state/kme.sqlite"
    control: str | None = None
    skip_listen: ListenAddress | None = None
    audit: str | None = None
    site_key: str | None = None
    epoch_keys: str | None = None
    sae_id_from: Literal["cn", "san-uri"] = "cn"
    sae_id_prefix: str = ""

    @model_validator(mode="after")
    def _prefix_has_a_uri(self) -> Kme:
        if self.sae_id_prefix and self.sae_id_from != "san-uri":
            raise ValueError('sae_id_prefix belongs to sae_id_from = "san-uri"')
        return self


class StoreTable(_Table):
    kind: Literal["sqlite", "postgresql"] = "sqlite"
    conninfo: str = Field(default="", repr=False)
    password: str | None = None
    require_standby: bool = True
    synchronous_commit: Literal["on", "remote_apply"] = "on"
    connections: int = Field(default=4, ge=1, le=64)
    timeout: float = Field(default=2.0, ge=0.2, le=30.0, strict=False)

    @model_validator(mode="after")
    def _fits(self) -> StoreTable:
        if self.kind == "sqlite" and self.model_fields_set - {"kind"}:
            raise ValueError('all but kind belongs to kind = "postgresql"')
        if self.kind == "postgresql" and ("://" in self.conninfo or "=" not in self.conninfo):
            raise ValueError('conninfo must be words like "host=... dbname=... user=..."')
        if re.search(r"(?i)\b(password|passfile)\s*=", self.conninfo):
            raise ValueError("conninfo must not have a password: name a file, or a credential, in password")
        return self


class Limits(_Table):
    max_key_per_request: int = Field(default=128, ge=1, le=1024)
    max_key_count: int = Field(default=100_000, ge=1, le=10_000_000)
    reserved_for: int = Field(default=86_400, ge=10)
    key_size: int = Field(default=UNIT_BITS, ge=8, multiple_of=8)
    min_key_size: int = Field(default=64, ge=8, multiple_of=8)
    max_key_size: int = Field(default=4096, le=65_536, multiple_of=8)
    max_SAE_ID_count: int = Field(default=8, ge=0, le=64)
    requests_per_second: Rate = 100.0
    burst: int = Field(default=1000, ge=1)
    keys_per_second: Rate = 0.0
    refuse_unhandled_optional: bool = False
    key_epoch: int = Field(default=3600, ge=1)
    unauthenticated_connections: int = Field(default=1024, ge=8, le=65_536)
    unauthenticated_per_address: int = Field(default=256, ge=4, le=65_536)
    handshake_timeout: float = Field(default=10.0, ge=0.5, le=60, strict=False)
    connections_per_sae: int = Field(default=128, ge=1, le=4096)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Limits:
        if not self.min_key_size <= self.key_size <= self.max_key_size:
            raise ValueError("key_size must lie between min_key_size and max_key_size")
        if self.max_key_per_request * -(-self.max_key_size // UNIT_BITS) > MAX_UNITS:
            raise ValueError(
                f"one request could take more than {MAX_UNITS * UNIT_BITS} bits; lower max_key_per_request"
            )
        return self


class PeerKme(_Table):
    id: Name
    url: Url
    saes: list[Name] = Field(min_length=1)


class Link(_Table):
    device: str | None = None
    """None: another process of the site, on the same database, has the device."""
    peer_kme: Name
    name: Name | None = None
    """Where several links lead to one KME, all but one need one; it names the link's stock for good."""

    @property
    def stock(self) -> str:
        """Under which name its key lies in the store."""
        return self.peer_kme if self.name is None else f"{self.peer_kme} {self.name}"


class Sae(_Table):
    id: Name
    may_share_with: list[Name] = Field(default_factory=list)
    requests_per_second: Rate | None = None
    burst: int | None = Field(default=None, ge=1)
    keys_per_second: Rate | None = None


class KmeConfig(_Table):
    """The whole file; :meth:`path` knows its folder."""

    version: Literal[1]
    kme: Kme
    store: StoreTable = Field(default_factory=StoreTable)
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
        stocks = [link.stock for link in self.link]
        for link in self.link:
            if link.peer_kme not in peers:
                raise ValueError(f"[[link]] peer_kme {link.peer_kme!r} must be one [[peer_kme]]")
            if link.stock in peers and link.name is not None:
                raise ValueError(f"[[link]] name {link.name!r} makes {link.stock!r}, which is another KME")
            if stocks.count(link.stock) > 1:
                raise ValueError(f"[[link]] peer_kme {link.peer_kme!r}: each of several links needs its own name")
        for sae in self.sae:
            for other in sae.may_share_with:
                if other not in foreign:
                    raise ValueError(f"[[sae]] {sae.id!r} may share with {other!r}, which no [[peer_kme]] serves")
        return self

    @model_validator(mode="after")
    def _store_fits(self) -> KmeConfig:
        if self.store.kind == "sqlite":
            if "store" not in self.kme.model_fields_set:
                raise ValueError("[kme] store: Field required")
            if any(link.device is None for link in self.link):
                raise ValueError("[[link]] device: only one of several processes at a PostgreSQL has none")
        elif "store" in self.kme.model_fields_set:
            raise ValueError("[kme] store is the file of an SQLite store; [store] says PostgreSQL")
        elif self.kme.site_key is None:
            raise ValueError("[kme] site_key: all processes at one PostgreSQL need the same one, so it must be named")
        return self

    def path(self, value: str) -> Path:
        return self._base / value

    @property
    def control_path(self) -> Path:
        return self.path(self.kme.control) if self.kme.control else self.path(self.kme.store).parent / "control.sock"

    @property
    def audit_path(self) -> Path:
        return self.path(self.kme.audit) if self.kme.audit else self.path(self.kme.store).parent / "audit.jsonl"

    def local_sae(self, name: str) -> Sae | None:
        return next((sae for sae in self.sae if sae.id == name), None)

    def peer_of(self, sae: str) -> PeerKme | None:
        """The KME that serves a foreign SAE."""
        return next((peer for peer in self.peer_kme if sae in peer.saes), None)

    @property
    def descriptors(self) -> int:
        """Most that this KME ever has open, by its own bounds."""
        listeners = 2 if self.kme.skip_listen is None else 3
        named = (listeners - 1) * (len(self.sae) + 1) + len(self.peer_kme) + 1  # strangers are one more name each
        limits = self.limits
        return 128 + listeners * limits.unauthenticated_connections + named * limits.connections_per_sae

    def saes_at(self, kme: str) -> list[str]:
        """The SAEs that another KME serves."""
        peer = self.peer(kme)
        return peer.saes if peer else []

    def peer(self, kme: str) -> PeerKme | None:
        return next((peer for peer in self.peer_kme if peer.id == kme), None)


def load(file: Path) -> KmeConfig:
    """Read and check a file.  Raises :class:`ConfigError`, one sentence per mistake, a line each."""
    try:
        table = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:  # its text quotes a byte, of a secret file perhaps
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    try:
        config = KmeConfig.model_validate(table)
    except ValidationError as error:
        lines = [f"{file}: {_sentence(place, text)}" for place, text in mistakes(error)]
        raise ConfigError("\n".join(lines)) from None
    config._base = file.resolve().parent
    return config


def needs_restart(old: KmeConfig, new: KmeConfig) -> str:
    """What a running KME cannot take over, as a sentence; empty where it can.

    It can take SAEs and who may share with whom, limits, and the certificates' files.
    """
    files = {"certificate": "", "private_key": "", "ca": "", "sae_id_from": "cn", "sae_id_prefix": ""}
    if old.kme.model_copy(update=files) != new.kme.model_copy(update=files):
        return "[kme]: only certificates and sae_id_from change without a restart"
    if old.link != new.link or [(p.id, p.url) for p in old.peer_kme] != [(p.id, p.url) for p in new.peer_kme]:
        return "[[peer_kme]] and [[link]] change only with a restart (the saes of a peer without)"
    if old.store != new.store:
        return "[store] changes only with a restart"
    if old.limits.max_key_count != new.limits.max_key_count:
        return "[limits] max_key_count changes only with a restart"
    return ""


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
