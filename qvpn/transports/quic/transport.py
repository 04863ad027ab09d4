"""``transport = "quic"``: the entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qvpn.netio.base import Address, Bind
from qvpn.transports.base import BadTransport, TransportContext
from qvpn.transports.quic import certificate
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.settings import parse_peer, parse_settings

LOOK = 60.0
"""Seconds between two looks whether an ACME client has put new files in the place of the certificate."""

OWN = "quic.pem"
"""In the state folder: the certificate that is made where none is configured."""


class Quic:
    """QUIC (RFC 9000) with DATAGRAM frames (RFC 9221)."""

    def __init__(self, settings: Mapping[str, Any], context: TransportContext) -> None:
        """Raises :class:`BadTransport`."""
        self._settings = parse_settings(settings)
        self._context = context
        self._stamps = self._stamp()
        self._looked = context.clock()
        self._certificate = self._configured()
        self._bind: QuicBind | None = None

    def _configured(self) -> certificate.Certificate | None:
        settings, context = self._settings, self._context
        if not settings.certificate:
            return None
        leaf = _read(context.read_file, context.base / settings.certificate, "certificate")
        key = _read(context.read_secret, context.base / settings.private_key, "private_key")
        try:
            return certificate.load(leaf, key)
        except BadTransport as error:
            file = settings.certificate if error.key == "certificate" else settings.private_key
            raise BadTransport(f"{context.base / file} {error}", key=error.key) from None

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """What changes when one of the configured files does."""
        found = []
        for name in (self._settings.certificate, self._settings.private_key):
            try:
                status = (self._context.base / name).stat()
                found.append((status.st_mtime_ns, status.st_ino))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _shown(self) -> certificate.Certificate:
        """For a new connection.  Files that have changed are read again; what cannot be used changes nothing."""
        now, log = self._context.clock(), self._context.log
        if self._settings.certificate and now - self._looked >= LOOK:
            self._looked, before, self._stamps = now, self._stamps, self._stamp()
            if self._stamps != before:
                try:
                    self._certificate = self._configured()
                    log.info("the QUIC certificate was read again", sha256=self.fingerprint)
                except BadTransport as error:
                    log.warning("the new QUIC certificate cannot be used, the old one is shown on", reason=str(error))
        if self._certificate is None:
            self._certificate = self._own()
        return self._certificate

    def _kept(self) -> certificate.Certificate | None:
        """The certificate that an earlier start made; None before the first."""
        file = self._context.state / OWN
        if not file.exists():
            return None
        pem = _read(self._context.read_secret, file, "certificate")
        try:
            return certificate.load(pem, pem)
        except BadTransport as error:
            raise BadTransport(f"{file} {error}; remove it, and a new one is made") from None

    def _own(self) -> certificate.Certificate:
        kept = self._kept()
        if kept is not None:
            return kept
        made = certificate.self_made(self._settings.server_name)
        try:
            self._context.write_secret(self._context.state / OWN, certificate.to_pem(made))
        except ValueError as error:
            raise BadTransport(str(error)) from None
        return made

    def over(self, lower: Bind) -> Bind:
        self._shown()
        self._bind = QuicBind(
            lower,
            self._shown,
            self._context.clock,
            self._context.call_later,
            alpn=self._settings.alpn,
            max_datagram_size=self._settings.max_datagram_size,
            log=self._context.log,
        )
        return self._bind

    def reach(self, place: Address, options: Mapping[str, Any]) -> Address:
        if self._bind is not None:
            self._bind.expect(place)
        return parse_peer(place, options)

    def counts(self) -> dict[str, int]:
        return {} if self._bind is None else self._bind.counts()

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of our certificate, for the other side's ``pin``; None while there is none yet."""
        shown = self._certificate or self._kept()
        return None if shown is None else certificate.fingerprint(shown.leaf).hex()


def _read(read: Callable[[Path], bytes], path: Path, key: str) -> bytes:
    try:
        return read(path)
    except ValueError as error:
        raise BadTransport(str(error), key=key) from None
