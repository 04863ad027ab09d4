"""What every source over mutual TLS (``etsi014``, ``skip``, ``etsi004``) has in its table, and its TLS context."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

from keysource import tls
from keysource.base import Hop, Origin, SourceContext
from keysource.errors import BadAnswer, BadSettings

_GROUP_TIMEOUT = 2.0


class RemoteTable(BaseModel):
    """The common part of ``[key_source.NAME]``; unknown keys are errors.  Files are PEM."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str
    ca: str
    """The only authority whose server certificates are believed."""
    certificate: str
    private_key: str
    origin: Origin | None = None
    """Where the keys come from, as far as the operator knows; nothing said: ``external``."""
    hop: Hop = Hop.CLASSICAL_TLS
    accept_harvestable_hop: bool = False

    @model_validator(mode="after")
    def _local_is_local(self) -> RemoteTable:
        if self.hop is Hop.LOCAL and not self.on_loopback:
            raise ValueError(
                'hop = "local" needs a url on 127.0.0.0/8, [::1] or localhost; say "zone" for a perimeter'
            )
        return self

    @property
    def host(self) -> str:
        """Name or address, without brackets."""
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


def agreed_origin(configured: Origin | None, said: Any, who: str) -> Origin:
    """What the operator's table and the other side (``who``) say together; None: nothing was said.

    Raises:
        BadAnswer: what was said is no origin, or differs from the table.
    """
    if said is None:
        return configured or Origin.EXTERNAL
    try:
        origin = Origin(said)
    except ValueError:
        raise BadAnswer(f"{who} names an origin that is none: {str(said)[:20]!r}") from None
    if configured is not None and origin is not configured:
        raise BadAnswer(
            f'{who} says that its keys are "{origin.value}", the configuration says "{configured.value}";'
            " the key is refused"
        )
    return origin


def check_url(value: str, scheme: str, *, path: bool, port: bool) -> str:
    """``SCHEME://HOST[:PORT][/PATH]`` and nothing else.  Raises ``ValueError``, one sentence."""
    form = f"{scheme}://HOST:PORT" if port else f"{scheme}://HOST[:PORT]"
    try:
        parts = urlsplit(value)
        number = parts.port
    except ValueError:
        raise ValueError(f'it must be "{form}" with a port from 1 to 65535') from None
    if parts.scheme != scheme or not parts.hostname or number == 0 or (port and number is None):
        raise ValueError(f'it must be "{form}"')
    if (
        parts.username
        or parts.password
        or parts.query
        or parts.fragment
        or (parts.path not in ("", "/") and not path)
    ):
        raise ValueError(f'user, {"" if path else "path, "}query and fragment have no place in "{form}"')
    return value


async def tls_context(table: RemoteTable, context: SourceContext) -> ssl.SSLContext:
    """Load the files; where ``hop`` claims it, allow post-quantum groups only and read back what came of it.

    Raises:
        BadSettings: a file is missing, is no PEM, has a wrong mode; or ``hop`` claims what cannot be checked.
    """
    made = load_files(table, context)
    if table.hop is Hop.PQ_TLS:
        await _post_quantum_only(table, made)
    return made


def load_files(table: RemoteTable, context: SourceContext) -> ssl.SSLContext:
    """The three files as a TLS context, without a connection.  Raises ``BadSettings``."""
    ca = _file("ca", table.ca, context, context.read_file)
    certificate = _file("certificate", table.certificate, context, context.read_file)
    private_key = _file("private_key", table.private_key, context, context.read_secret)
    try:
        return tls.client_context(ca, certificate, private_key)
    except ValueError as error:
        raise BadSettings(str(error), key="ca" if "CA" in str(error) else "private_key") from None


def _file(key: str, name: str, context: SourceContext, read: Callable[[Path], bytes]) -> bytes:
    path = context.path(name)
    try:
        return read(path)
    except OSError as error:
        raise BadSettings(f"{key}: {path}: {error.strerror or error}", key=key) from None
    except ValueError as error:
        raise BadSettings(f"{key}: {error}", key=key) from None


async def _post_quantum_only(table: RemoteTable, context: ssl.SSLContext) -> None:
    try:
        tls.restrict_to_post_quantum(context)
    except ValueError as error:
        raise BadSettings(f"hop: {error}", key="hop") from None
    try:
        async with asyncio.timeout(_GROUP_TIMEOUT):
            _reader, writer = await asyncio.open_connection(table.host, table.port, ssl=context)
    except (OSError, TimeoutError):
        return  # the restriction of the context holds whenever it comes up
    group = tls.negotiated_group(writer.get_extra_info("ssl_object")) or ""
    writer.close()
    if "MLKEM" not in group.upper():
        raise BadSettings(f"hop: the classical group {group!r} was negotiated", key="hop")
