"""Certificate, private key and CA of a program: from files to TLS contexts, and whether the files have changed."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from keysource import tls
from keysource.kme.config import ConfigError

Fingerprint = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where they are, by the ``table`` of a configuration that names them."""

    table: str
    ca: Path
    certificate: Path
    private_key: Path

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """TLS for listeners, and for calls to others.  Raises :class:`ConfigError`."""
        ca = read_file(self.table, "ca", self.ca)
        certificate = read_file(self.table, "certificate", self.certificate)
        private_key = read_file(self.table, "private_key", self.private_key, secret=True)
        try:
            return tls.server_context(ca, certificate, private_key), tls.client_context(ca, certificate, private_key)
        except ValueError as error:
            raise ConfigError(f"{self.table}: {error}") from None

    def fingerprint(self) -> Fingerprint:
        """Differs when one of the files was written or replaced."""
        return fingerprint_of((self.ca, self.certificate, self.private_key))


def read_file(table: str, key: str, path: Path, *, secret: bool = False) -> bytes:
    """What ``key`` of a configuration's ``table`` names.  Raises :class:`ConfigError`."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or (secret and mode & 0o077):
                raise ConfigError(f"{table} {key}: {path} must be a file with mode 0600")
            return file.read()
    except OSError as error:
        raise ConfigError(f"{table} {key}: {path}: {error.strerror}") from None


def fingerprint_of(paths: Iterable[Path]) -> Fingerprint:
    """Differs when one of the files was written or replaced."""
    return tuple(_stat(path) for path in paths)


def not_after(certificate: Path) -> str:
    """When a certificate ends, ISO 8601; empty where that cannot be read."""
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.isoformat()
    except (OSError, ValueError):
        return ""


def _stat(path: Path) -> object:
    try:
        info = path.stat()
    except OSError as error:
        return error.errno
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
