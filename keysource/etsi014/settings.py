"""The table ``[key_source.NAME]`` with ``type = "etsi014"``."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from keysource.base import Hop, Origin
from keysource.settings import parse_settings


class Etsi014Settings(BaseModel):
    """What an operator writes; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str
    """``https://HOST[:PORT]`` of the KME; a path before ``/api/v1`` may follow."""
    sae: str
    """Our SAE ID at this KME."""
    ca: str
    """PEM file: the only authority whose KME certificates are believed."""
    certificate: str
    private_key: str
    origin: Origin | None = None
    """Where the keys come from, as far as the operator knows; nothing said: what the KME says, else ``external``."""
    hop: Hop = Hop.CLASSICAL_TLS
    accept_harvestable_hop: bool = False
    """Whoever records this hop today can have its keys with a quantum computer; true accepts that."""
    method: Literal["get", "post"] = "post"

    @field_validator("url")
    @classmethod
    def _https(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            port = parts.port
        except ValueError:
            raise ValueError("the port is not a number from 1 to 65535") from None
        if parts.scheme != "https" or not parts.hostname or port == 0:
            raise ValueError('it must be "https://HOST" or "https://HOST:PORT"')
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("user, query and fragment have no place here")
        return value

    @field_validator("sae")
    @classmethod
    def _sae(cls, value: str) -> str:
        return check_sae(value)

    @model_validator(mode="after")
    def _local_is_local(self) -> Etsi014Settings:
        if self.hop is Hop.LOCAL and not self.on_loopback:
            raise ValueError(
                'hop = "local" needs a url on 127.0.0.0/8, [::1] or localhost; say "zone" for a perimeter'
            )
        return self

    @property
    def host(self) -> str:
        """Name or address of the KME, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 443

    @property
    def on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def harvestable(self) -> bool:
        """Does the key cross a wire under classical key exchange only?"""
        return self.hop is Hop.CLASSICAL_TLS and not self.on_loopback


def check_sae(value: str) -> str:
    """An SAE ID that can stand in a URL path.  Raises ``ValueError``."""
    if not 1 <= len(value) <= 200 or not value.isprintable() or value in (".", ".."):
        raise ValueError("an SAE ID has 1 to 200 printable characters")
    return value


def settings_untrusted(table: Mapping[str, object]) -> Etsi014Settings:
    """Raises :class:`~keysource.errors.BadSettings` that names the key."""
    return parse_settings(Etsi014Settings, table)
