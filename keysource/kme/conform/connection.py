"""Clauses 4 and 5.1: TLS, who is who on either side, and what holds for every answer."""

from __future__ import annotations

import asyncio
import os
import ssl
import warnings
from urllib.parse import urlsplit

from keysource import tls
from keysource.kme.conform.caller import Caller, NoAnswer
from keysource.kme.conform.kit import Kit, check, denied
from keysource.kme.conform.report import Failed, Skipped, Warned
from keysource.kme.pki import Authority

_PATIENCE = 10.0
_OURS = ("NO_PROTOCOLS_AVAILABLE", "NO_CIPHERS_AVAILABLE")  # what the library here refuses by itself


async def _shake(url: str, context: ssl.SSLContext) -> ssl.SSLObject:
    """A handshake, and the first byte after it: in TLS 1.3 a client hears only then that it was refused."""
    parts = urlsplit(url)
    async with asyncio.timeout(_PATIENCE):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 443, ssl=context)
        try:
            writer.write(f"GET /api/v1/keys/x/status HTTP/1.1\r\nHost: {parts.hostname}\r\n\r\n".encode())
            if not await reader.read(1):
                raise ConnectionResetError("closed without an answer")
            made: ssl.SSLObject = writer.get_extra_info("ssl_object")
            return made
        finally:
            writer.transport.abort()


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "TLS fails").lower().replace("_", " ")
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if number else type(error).__name__


@check("5.1", "Communication is HTTPS with TLS 1.2 or newer, and the KME's certificate is checked by the SAE.")
async def tls_is_12_or_newer(kit: Kit) -> str:
    try:
        made = await _shake(kit.master.url, kit.master.context)
    except ssl.SSLCertVerificationError as error:
        raise Failed(f"its certificate is refused: {error.verify_message}") from None
    except (OSError, TimeoutError) as error:
        raise Failed(f"no TLS connection: {_why(error)}") from None
    return f"{made.version()}, {(made.cipher() or ('?',))[0]}"


@check("5.1", "TLS older than 1.2 is refused.")
async def old_tls_is_refused(kit: Kit) -> str:
    context = kit.master.make_context()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        made = await _shake(kit.master.url, context)
    except (OSError, TimeoutError, ValueError) as error:
        if getattr(error, "reason", None) in _OURS or not isinstance(error, OSError | TimeoutError):
            raise Skipped("the TLS library here cannot speak TLS 1.1 any more") from None
        return "a client that offers TLS 1.1 at most is turned away"
    raise Failed(f"{made.version()} was accepted")


@check("5.1", "The KME authenticates the SAE by its certificate: without one there are no keys.")
async def without_a_certificate_there_is_nothing(kit: Kit) -> str:
    context = ssl.create_default_context(cadata=kit.ca.decode())
    return await _nobody(kit, context, "a client without certificate")


@check("5.1", "A certificate of an authority that the KME does not know is no certificate.")
async def a_foreign_authority_is_not_believed(kit: Kit) -> str:
    own = Authority("nobody's authority").sae(kit.master.sae)  # the right name
    context = tls.client_context(kit.ca, own.certificate, own.private_key)
    return await _nobody(kit, context, "a certificate of the right name and another authority")


async def _nobody(kit: Kit, context: ssl.SSLContext, who: str) -> str:
    caller = Caller(kit.master.url, kit.master.sae, lambda: context, kit.notebook)
    try:
        answer = await caller.call("GET", kit.slave.sae, "status")
    except NoAnswer:
        return f"{who} gets no connection"
    finally:
        await caller.aclose()
    return f"{who}: {denied(answer)}"


@check("5.1", "The SAE confirms the KME ID by the KME's certificate, so the ID stands in it.")
async def the_certificate_names_the_kme(kit: Kit) -> str:
    try:
        made = await _shake(kit.master.url, kit.master.context)
    except (OSError, TimeoutError):
        raise Skipped("no connection") from None
    names = tls.names_of(made)
    answer = await kit.master.call("GET", kit.slave.sae, "status")
    said = answer.object().get("source_KME_ID") if answer.status == 200 else None
    if not isinstance(said, str):
        raise Skipped("it does not say its source_KME_ID")
    if said not in names and not any(name.endswith((f"/{said}", f":{said}")) for name in names):
        raise Warned(f"source_KME_ID {said[:60]!r} stands in no name of the certificate")
    return f"{said[:60]!r} stands in the certificate"
