"""The configuration of one site, checked table by table.  ``config.load`` makes it from TOML.

Paths are as written; :meth:`Config.path` resolves them against the folder of the file.  Durations are seconds.
"""

from __future__ import annotations

import enum
import re
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from qvpn.config.units import (
    HostPort,
    IPNetwork,
    parse_duration,
    parse_host_port,
    parse_listen,
    parse_name,
    parse_network,
    show_duration,
)

MIN_MTU, MIN_MTU_IPV6, MAX_MTU = 576, 1280, 65_465
"""Tunnel MTU: the smallest that IPv4 and IPv6 allow, and what one UDP datagram can carry (65,507 - 42)."""

MAX_LANES = 16
"""A lane is four bits of a record's receive index."""

MIN_REKEY, MAX_REKEY = 1.0, 3600.0
_U32 = 2**32 - 1

Duration = Annotated[float, BeforeValidator(parse_duration)]
Name = Annotated[str, BeforeValidator(parse_name)]
Listen = Annotated[HostPort, BeforeValidator(parse_listen)]
Endpoint = Annotated[HostPort, BeforeValidator(parse_host_port)]
Network = Annotated[IPNetwork, BeforeValidator(parse_network)]


class Policy(enum.StrEnum):
    """When an epoch is acceptable; each side decides for itself (PROTOCOL.md chapter 7)."""

    REQUIRE_QKD = "require-qkd"
    PREFER_QKD = "prefer-qkd"
    PQC_ONLY = "pqc-only"


class Initiate(enum.StrEnum):
    """Which side starts handshakes: some key managers can issue keys in one direction only."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class OnAlarm(enum.StrEnum):
    """What an alarm of the key source (QBER, device monitor) does to the live epoch."""

    FINISH_EPOCH = "finish-epoch"
    REKEY_NOW = "rekey-now"
    BLOCK_NOW = "block-now"


def least_hard_end(rekey: float) -> float:
    """A rekey that fails needs time for a second try before the keys are erased.  Seconds."""
    return 2 * rekey + 3


def default_hard_end(rekey: float) -> float:
    """Three rekeys; below 3 s that would be less than the least."""
    return max(3 * rekey, least_hard_end(rekey))


def dead_peer(rekey: float) -> float:
    """Seconds of silence after which a peer is taken for dead (PROTOCOL.md chapter 9)."""
    return min(30.0, 2 * rekey)


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, arbitrary_types_allowed=True, strict=True
    )


def _interface(value: object) -> IPv4Interface | IPv6Interface:
    if not isinstance(value, str) or "/" not in value:
        raise ValueError('write an address with its prefix, such as "10.90.0.1/24"')
    try:
        return ip_interface(value)
    except ValueError:
        raise ValueError(f"{value!r} is not an IP address with a prefix") from None


def _listed(value: object) -> object:
    """TOML arrays arrive as lists; strict tuples want tuples."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else _listed(value)


def _word(kind: type[enum.StrEnum]) -> BeforeValidator:
    def choose(value: object) -> object:
        words = [member.value for member in kind]
        if value not in words:
            raise ValueError("write one of " + ", ".join(f'"{word}"' for word in words))
        return kind(str(value))

    return BeforeValidator(choose)


class Site(_Table):
    """``[site]``: this end."""

    name: Name
    identity: str = Field(min_length=1)
    listen: Listen
    state: str = Field(default="state", min_length=1)


class Tunnel(_Table):
    """``[tunnel]``: the inner network device."""

    interface: str = "qvpn0"
    addresses: Annotated[
        tuple[Annotated[IPv4Interface | IPv6Interface, BeforeValidator(_interface)], ...], BeforeValidator(_listed)
    ] = ()
    mtu: int | None = Field(default=None)
    lanes: int = 1

    @field_validator("interface")
    @classmethod
    def _device(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", value, re.ASCII) is None or value in (".", ".."):
            raise ValueError("a device name has 1 to 15 letters, digits, '-', '_' or '.'")
        return value

    @field_validator("mtu")
    @classmethod
    def _mtu(cls, value: int | None) -> int | None:
        if value is not None and not MIN_MTU <= value <= MAX_MTU:
            raise ValueError(f"{value} is outside {MIN_MTU} to {MAX_MTU}")
        return value

    @field_validator("lanes")
    @classmethod
    def _lanes(cls, value: int) -> int:
        if not 1 <= value <= MAX_LANES:
            raise ValueError(f"{value} is outside 1 to {MAX_LANES}")
        return value


class KeySourceTable(BaseModel):
    """``[key_source.NAME]``: the words that every source shares; the rest belongs to the source of that type."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    type: str = Field(min_length=1)

    @property
    def settings(self) -> dict[str, Any]:
        """The table without ``type``, as the source's own settings get it."""
        return dict(self.model_extra or {})


class CarrierTable(BaseModel):
    """``[carrier.NAME]``: settings of a transport for the whole site; the transport checks them."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PeerCarrier(BaseModel):
    """``[peer.carriers.NAME]``: how one peer is reached by a transport; the transport checks the rest."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True, arbitrary_types_allowed=True)

    endpoint: Endpoint | None = None
    """Instead of the peer's."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Peer(_Table):
    """``[[peer]]``: one other site."""

    name: Name
    public_key: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
    """Files; several while an identity rolls over."""
    endpoint: Endpoint | None = None
    allowed_ips: Annotated[tuple[Network, ...], BeforeValidator(_listed)]
    policy: Annotated[Policy, _word(Policy)] = Policy.REQUIRE_QKD
    rekey: Duration = 60.0
    hard_end: Duration | None = None
    max_qkd_age: Duration | None = None
    max_degraded: Duration | None = None
    key_source: str | None = None
    sae: str = ""
    suites: Annotated[tuple[int, ...], BeforeValidator(_listed)] = (1,)
    psk: str | None = None
    """File with 32 bytes in base64."""
    initiate: Annotated[Initiate, _word(Initiate)] = Initiate.AUTO
    keepalive: Duration | None = None
    transport: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = ("udp",)
    """What the peer may be reached by, the preferred one first."""
    carriers: dict[Name, PeerCarrier] = Field(default_factory=dict)
    allow_simulated: bool = False
    on_alarm: Annotated[OnAlarm, _word(OnAlarm)] = OnAlarm.FINISH_EPOCH

    @property
    def end(self) -> float:
        """Seconds after which an epoch's keys are erased, whatever happens."""
        return default_hard_end(self.rekey) if self.hard_end is None else self.hard_end

    @field_validator("public_key")
    @classmethod
    def _some_key(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("name the file with the peer's public key")
        return value

    @field_validator("allowed_ips")
    @classmethod
    def _some_network(cls, value: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
        if not value:
            raise ValueError("list at least one network of the peer, else nothing can pass")
        return value

    @field_validator("rekey")
    @classmethod
    def _rekey(cls, value: float) -> float:
        if not MIN_REKEY <= value <= MAX_REKEY:
            raise ValueError(f'{show_duration(value)} is outside "1s" to "1h"')
        return value

    @field_validator("transport")
    @classmethod
    def _transports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError('name transports, each once, the preferred one first: ["udp", "quic"]')
        return value

    @field_validator("suites")
    @classmethod
    def _suites(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or not set(value) <= {1, 2, 3}:
            raise ValueError("list suites 1, 2 or 3, each once, the one to offer first")
        if 3 in value and len(value) > 1:
            raise ValueError("suite 3 needs ML-DSA-87 keys, suites 1 and 2 ML-DSA-65 keys: they do not go together")
        return value

    @field_validator("max_qkd_age")
    @classmethod
    def _age(cls, value: float | None) -> float | None:
        if value is not None and not 1 <= value <= _U32:
            raise ValueError(f"{show_duration(value)} is outside 1 second to {_U32} seconds")
        return value

    @field_validator("keepalive")
    @classmethod
    def _keepalive(cls, value: float | None) -> float | None:
        if value is not None and not 1 <= value <= 3600:
            raise ValueError(f'{show_duration(value)} is outside "1s" to "1h"')
        return value

    @model_validator(mode="after")
    def _times(self) -> Peer:
        least = least_hard_end(self.rekey)
        if self.end < least:
            raise ValueError(
                f"hard_end: {show_duration(self.end)} is too early for rekey = {show_duration(self.rekey)}: "
                f"a failed rekey needs a second try, so write at least {show_duration(least)}"
            )
        if self.keepalive is not None and self.keepalive >= dead_peer(self.rekey):
            raise ValueError(
                f"keepalive: {show_duration(self.keepalive)} is too long for rekey = {show_duration(self.rekey)}: "
                f"the peer takes us for dead after {show_duration(dead_peer(self.rekey))}, so write less"
            )
        if self.max_degraded is not None and self.policy is not Policy.PREFER_QKD:
            raise ValueError(f'max_degraded: it limits policy "prefer-qkd", and the policy here is "{self.policy}"')
        return self

    @model_validator(mode="after")
    def _needs(self) -> Peer:
        if self.policy is not Policy.PQC_ONLY and self.key_source is None:
            raise ValueError(f'key_source: policy "{self.policy}" needs the name of a [key_source.NAME] table')
        if unused := sorted(set(self.carriers) - set(self.transport)):
            raise ValueError(f"carriers: {unused[0]} is not among the peer's transports")
        if self.initiate is Initiate.ALWAYS and self.endpoint is None:
            raise ValueError('endpoint: initiate = "always" needs an address to start to')
        return self


class Config(_Table):
    """One site's whole file."""

    version: Literal[1]
    site: Site
    tunnel: Tunnel = Tunnel()
    key_source: dict[Name, KeySourceTable] = Field(default_factory=dict)
    carrier: dict[Name, CarrierTable] = Field(default_factory=dict)
    peer: Annotated[tuple[Peer, ...], BeforeValidator(_listed)] = ()

    _file: Path = PrivateAttr(default=Path("qvpn.toml"))

    @property
    def file(self) -> Path:
        """Where this configuration was read from."""
        return self._file

    @property
    def folder(self) -> Path:
        """What relative paths of the file start from."""
        return self._file.parent

    def path(self, value: str) -> Path:
        """A path written in the file."""
        return self.folder / value

    def transports(self) -> list[str]:
        """Every transport that a peer may be reached by, each once."""
        return list(dict.fromkeys(name for peer in self.peer for name in peer.transport))

    def at(self, file: Path) -> Config:
        """The same configuration, read from ``file``."""
        copy = self.model_copy()
        copy._file = file
        return copy
