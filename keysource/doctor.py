"""What is wrong with a key source, and what to do: looks at it from outside, consumes no key.

Certificates (dates, and so the clock), the TLS connection and its group, the server's clock, whether the source is
ready for each peer, in which direction, how long that answer took, and what survives when the last hop is recorded.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from cryptography import x509

from keysource import tls
from keysource.base import KeySource, Looking, SourceContext, SourceStatus
from keysource.errors import KeySourceError

LIMIT = 5.0
"""Seconds for each question over a network."""
SOON = datetime.timedelta(days=14)
MOST_SKEW = 5.0
"""Seconds between two clocks that are worth a word."""
SLOW = 0.5
"""Seconds of a round trip that eat into the two that a handshake gives a source."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """``fine``, ``warning`` or ``wrong``."""
    said: str
    todo: str = ""
    """What an operator should do; empty where it is fine."""


async def examine(
    settings: Mapping[str, object], context: SourceContext, source: KeySource, peers: Sequence[str]
) -> list[Finding]:
    """All findings about one source.  ``peers`` are the peers' names there.  Starts and closes ``source``."""
    found = _certificates(settings, context)
    url = settings.get("url")
    if isinstance(url, str):
        found += await _connection(url, settings, context)
    return found + await _readiness(source, peers)


def _certificates(settings: Mapping[str, object], context: SourceContext) -> list[Finding]:
    found = []
    for key in ("ca", "certificate"):
        name = settings.get(key)
        if not isinstance(name, str):
            continue
        try:
            certificates = x509.load_pem_x509_certificates(context.read_file(context.path(name)))
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or "is no PEM certificate"
            found.append(Finding(key, "wrong", f"{context.path(name)}: {text}", "put the PEM file there"))
            continue
        found.append(_dates(f"{key} {name}", min(certificates, key=lambda one: one.not_valid_after_utc)))
    return found


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _dates(what: str, certificate: x509.Certificate) -> Finding:
    now = _now()
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    said = f"valid until {last:%Y-%m-%d}"
    if now > last:
        return Finding(what, "wrong", f"expired on {last:%Y-%m-%d %H:%M} UTC", "have a new one issued")
    if now < first:
        return Finding(what, "wrong", f"is valid from {first:%Y-%m-%d %H:%M} UTC on", "set this host's clock")
    if last - now < SOON:
        return Finding(what, "warning", said, "have a new one issued before that")
    return Finding(what, "fine", said)


async def _connection(url: str, settings: Mapping[str, object], context: SourceContext) -> list[Finding]:
    parts = urlsplit(url)
    where = f"{parts.hostname}:{parts.port or 443}"
    try:
        made = _tls(settings, context)
        began = time.perf_counter()
        async with asyncio.timeout(LIMIT):
            _reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 443, ssl=made)
    except ssl.SSLCertVerificationError as error:
        todo = "check the server's name and dates, and that `ca` is the authority that issued its certificate"
        return [Finding("TLS", "wrong", f"{where}: {error.verify_message}", todo)]
    except ssl.SSLError as error:
        todo = "check that the server believes the authority of `certificate`"
        return [Finding("TLS", "wrong", f"{where}: {(error.reason or 'TLS fails').lower().replace('_', ' ')}", todo)]
    except (OSError, TimeoutError) as error:
        number = getattr(error, "errno", None)
        text = os.strerror(number).lower() if number else f"no answer within {LIMIT:g} s"
        return [Finding("TLS", "wrong", f"{where}: {text}", "check address, port, routes and that the server runs")]
    except ValueError as error:
        return [Finding("TLS", "wrong", str(error), "put matching PEM files there; the private key has mode 0600")]
    seconds = time.perf_counter() - began
    found = [_negotiated(where, seconds, writer.get_extra_info("ssl_object"))]
    writer.close()
    if parts.scheme == "https":
        found.append(await _clock(url, made))
    return found


def _tls(settings: Mapping[str, object], context: SourceContext) -> ssl.SSLContext:
    ca, certificate = (context.read_file(context.path(str(settings.get(key)))) for key in ("ca", "certificate"))
    made = tls.client_context(ca, certificate, context.read_secret(context.path(str(settings.get("private_key")))))
    name = settings.get("kme")
    return tls.must_name(made, name) if isinstance(name, str) else made


def _negotiated(where: str, seconds: float, connection: ssl.SSLObject) -> Finding:
    group = tls.negotiated_group(connection) or "group not readable by this Python"
    said = f"{where}: {connection.version()}, {group}, {1000 * seconds:.0f} ms"
    raw = connection.getpeercert(binary_form=True)
    dates = _dates("TLS", x509.load_der_x509_certificate(raw)) if raw else None
    if dates is not None and dates.state != "fine":
        return Finding("TLS", dates.state, f"{said}; the server's certificate {dates.said}", "have it renewed there")
    return Finding("TLS", "fine", said)


async def _clock(url: str, made: ssl.SSLContext) -> Finding:
    try:
        async with (
            asyncio.timeout(LIMIT),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=made), trust_env=False) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            date = answer.headers.get("Date")
        theirs = email.utils.parsedate_to_datetime(date or "")
    except (aiohttp.ClientError, OSError, TimeoutError):
        return Finding("clock", "warning", "the server did not answer a plain request", "look into the server's log")
    except ValueError:
        return Finding("clock", "fine", "the server does not tell its time")
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=datetime.UTC)
    skew = abs((_now() - theirs).total_seconds())
    if skew > MOST_SKEW:
        return Finding("clock", "warning", f"{skew:.0f} s away from the server's", "run NTP on both hosts")
    return Finding("clock", "fine", "within 5 s of the server's")


async def _readiness(source: KeySource, peers: Sequence[str]) -> list[Finding]:
    try:
        looked = await source.look() if isinstance(source, Looking) else None
        if looked is not None:
            return [one for peer in peers for one in _said(_keys_for(peer), looked, 0.0)]
        await source.start()
    except KeySourceError as error:
        in_use = "another process uses" in str(error)
        todo = "stop the daemon to look closer, or ask `qvpn status`" if in_use else "correct what it says"
        return [Finding("start", "warning" if in_use else "wrong", str(error), todo)]
    found = []
    try:
        for peer in peers:
            found += await _one_peer(source, peer)
    finally:
        await source.aclose()
    return found


async def _one_peer(source: KeySource, peer: str) -> list[Finding]:
    what, deadline = _keys_for(peer), time.monotonic() + LIMIT
    while True:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(LIMIT):
                status = await source.status(peer)
        except (KeySourceError, TimeoutError) as error:
            return [Finding(what, "wrong", str(error) or f"no status within {LIMIT:g} s", "see TLS above")]
        seconds = time.perf_counter() - began
        if status.ready or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)  # a stream that is being opened
    return _said(what, status, seconds)


def _keys_for(peer: str) -> str:
    return f"keys for {peer or 'the peer'}"


def _said(what: str, status: SourceStatus, seconds: float) -> list[Finding]:
    stock = "" if status.stored_keys is None else f", {status.stored_keys} keys stored"
    if not status.ready:
        todo = (
            "the device must be looked at"
            if status.alarm
            else "check `sae` here and at the peer, and that the KME lets these two share keys in this direction"
        )
        ready = Finding(what, "wrong", status.reason, todo)
    elif seconds > SLOW:
        ready = Finding(what, "warning", f"answered after {1000 * seconds:.0f} ms{stock}", "shorten the way to it")
    else:
        ready = Finding(what, "fine", f"ready, {1000 * seconds:.0f} ms{stock}")
    found = [ready]
    if status.ready and status.stored_keys == 0:
        todo = 'where the link issues keys at its other end only, write initiate = "never" for this peer'
        found.append(Finding("direction", "warning", f"{what}: to be fetched, none to be drawn here now", todo))
    origin = "unknown" if status.origin is None else status.origin.value
    said = f"origin {origin}, hop {status.hop.value}"
    if status.survives_harvest:
        return [*found, Finding("hop", "fine", f"{said}: its keys survive harvesting of that hop")]
    todo = 'bring the source near (hop = "zone" or "local"), or a TLS with ML-KEM (hop = "pq-tls")'
    return [*found, Finding("hop", "warning", f"{said}: recorded today, its keys can be read later", todo)]
