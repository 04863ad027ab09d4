"""``qvpn-kme check``: what can be known about a KME before it runs, beyond that its configuration is well-formed.

A *fault* keeps it from running, or from being believed by anybody; a *hint* is what an operator should know.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from keysource.kme.auth import must_be
from keysource.kme.config import KmeConfig, PeerKme
from keysource.kme.credentials import contexts
from keysource.kme.epochs import read_site_key, site_key_path
from keysource.kme.records import NO_STANDBY, StoreError
from keysource.kme.stores import is_shared, server_of

_SOON = datetime.timedelta(days=30)
_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence, and whether it is a fault."""

    fault: bool
    text: str


def findings(config: KmeConfig, now: datetime.datetime) -> list[Finding]:
    """Everything that can be seen on this machine.  The certificates must load (:func:`contexts`)."""
    return [*_certificates(config, now), *_secrets(config), *_places(config), *_store(config), *_table(config)]


async def peers(config: KmeConfig) -> list[Finding]:
    """Whether the other KMEs answer, with the name and authority that they must have.  One line each."""
    return list(await asyncio.gather(*(_peer(config, peer) for peer in config.peer_kme)))


def database(config: KmeConfig) -> Iterator[Finding]:
    """What the PostgreSQL of the configuration says now."""
    if not is_shared(config):
        return
    try:
        server = server_of(config)
        with contextlib.closing(server.connect()) as connection:
            names, fsync, version = (
                str((connection.execute(f"SHOW {name}").fetchone() or [""])[0])
                for name in ("synchronous_standby_names", "fsync", "server_version")
            )
    except StoreError as error:
        yield Finding(True, f"[store]: {error}")
        return
    yield Finding(False, f"[store]: {server.where} answers, version {version}, timeline {server.timeline}")
    if not names:
        yield Finding(config.store.require_standby, f"[store]: {NO_STANDBY}")
    if fsync != "on":
        yield Finding(True, "[store]: fsync of the server is off: a power cut could give a key out twice")


def _store(config: KmeConfig) -> Iterator[Finding]:
    if not is_shared(config):
        return
    try:
        server_of(config)
    except StoreError as error:
        yield Finding(True, str(error))
    if not config.store.require_standby:
        text = "[store] require_standby = false: a failover of the database may give a key out twice"
        yield Finding(False, text)
    if not any(link.device for link in config.link):
        yield Finding(False, "[[link]]: this process has no device; another one of the site must have it")


def _certificates(config: KmeConfig, now: datetime.datetime) -> Iterator[Finding]:
    path = config.path(config.kme.certificate)
    own = x509.load_pem_x509_certificate(path.read_bytes())
    authorities = x509.load_pem_x509_certificates(config.path(config.kme.ca).read_bytes())
    yield from _dates(f"[kme] certificate {path}", own, now)
    for authority in authorities:
        yield from _dates(f"[kme] ca {config.path(config.kme.ca)}", authority, now)
    names = [str(name.value) for name in own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [config.kme.id]:
        text = f"[kme] certificate {path}: the other KMEs know us as {config.kme.id!r}; its common name is {names}"
        yield Finding(True, text)
    try:
        usages: Sequence[x509.ObjectIdentifier] = list(
            own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        )
    except x509.ExtensionNotFound:
        usages = []
    for usage, reason in ((ExtendedKeyUsageOID.SERVER_AUTH, "SAEs"), (ExtendedKeyUsageOID.CLIENT_AUTH, "other KMEs")):
        if usages and usage not in usages:
            yield Finding(True, f"[kme] certificate {path}: its extended key usage does not let it speak to {reason}")
    if not any(_issued(own, authority) for authority in authorities):
        yield Finding(False, f"[kme] certificate {path}: none of the ca signed it; the file must hold the chain")


def _dates(what: str, certificate: x509.Certificate, now: datetime.datetime) -> Iterator[Finding]:
    end = certificate.not_valid_after_utc
    if now < certificate.not_valid_before_utc:
        yield Finding(True, f"{what}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    elif now >= end:
        yield Finding(True, f"{what}: ended {end:%Y-%m-%d %H:%M} UTC")
    elif now >= end - _SOON:
        yield Finding(False, f"{what}: ends {end:%Y-%m-%d %H:%M} UTC, in {(end - now).days} days")


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _secrets(config: KmeConfig) -> Iterator[Finding]:
    if config.kme.site_key is None:
        text = "[kme] site_key: none; one will be made beside the store, which a thief of the disk gets as well"
        yield Finding(False, text)
        return
    try:
        read_site_key(site_key_path(config.kme.site_key, config.path("")))
    except StoreError as error:
        yield Finding(True, f"[kme] site_key: {error}")


def _places(config: KmeConfig) -> Iterator[Finding]:
    folder = config.path(config.kme.store).parent
    if not is_shared(config) and folder.exists() and folder.stat().st_mode & 0o077:
        yield Finding(True, f"[kme] store: {folder} lets others in; it must be 0700")
    audit = config.audit_path.parent
    if audit.exists() and not os.access(audit, os.W_OK | os.X_OK):
        yield Finding(True, f"[kme] audit: {audit} cannot be written to; nothing is handed out without an audit log")
    for link in config.link:
        device = None if link.device is None else config.path(link.device)
        if device is not None and not device.is_socket():
            yield Finding(False, f"[[link]] to {link.stock!r}: no device listens at {device} now")
    linked = {link.peer_kme for link in config.link}
    for peer in config.peer_kme:
        if peer.id not in linked:
            yield Finding(False, f"[[peer_kme]] {peer.id!r} has no [[link]]: there are no keys for its SAEs")


def _table(config: KmeConfig) -> Iterator[Finding]:
    for sae in config.sae:
        if not sae.may_share_with:
            yield Finding(False, f"[[sae]] {sae.id!r} may share with nobody")
    wanted = {name for sae in config.sae for name in sae.may_share_with}
    for peer in config.peer_kme:
        for name in peer.saes:
            if name not in wanted:
                yield Finding(False, f"[[peer_kme]] {peer.id!r} serves {name!r}, with whom nobody here may share")


async def _peer(config: KmeConfig, peer: PeerKme) -> Finding:
    parts = urlsplit(peer.url)
    host, port = parts.hostname or "", parts.port or 443
    context = must_be(contexts(config)[1], peer.id)
    try:
        async with asyncio.timeout(_PATIENCE):
            _reader, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error.args[0])
        return Finding(True, f"KME {peer.id!r} at {peer.url}: {reason}")
    except (OSError, TimeoutError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no answer"
        return Finding(True, f"KME {peer.id!r} at {peer.url}: {reason}")
    connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
    version, end = connection.version(), (connection.getpeercert() or {}).get("notAfter")
    writer.transport.abort()
    return Finding(False, f"KME {peer.id!r} at {peer.url}: answers with {version}, its certificate ends {end}")
