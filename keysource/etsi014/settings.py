"""The table ``[key_source.NAME]`` with ``type = "etsi014"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import field_validator

from keysource.remote import RemoteTable, check_url
from keysource.settings import parse_settings


class Etsi014Settings(RemoteTable):
    """What an operator writes.  ``url`` is that of the KME; a path before ``/api/v1`` may follow its host.

    Without ``origin`` the KME's word for it holds, else ``external``.
    """

    sae: str
    """Our SAE ID at this KME."""
    method: Literal["get", "post"] = "post"
    kme: str | None = None
    """The KME ID, which must stand in its certificate (ETSI GS QKD 014 clause 5.1); None: its host name is enough."""

    @field_validator("url")
    @classmethod
    def _https(cls, value: str) -> str:
        return check_url(value, "https", path=True, port=False)

    @field_validator("sae", "kme")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        return None if value is None else check_sae(value)


def check_sae(value: str) -> str:
    """An SAE ID that can stand in a URL path.  Raises ``ValueError``."""
    if not 1 <= len(value) <= 200 or not value.isprintable() or value in (".", ".."):
        raise ValueError("an SAE ID has 1 to 200 printable characters")
    return value


def settings_untrusted(table: Mapping[str, object]) -> Etsi014Settings:
    """Raises :class:`~keysource.errors.BadSettings` that names the key."""
    return parse_settings(Etsi014Settings, table)
