"""The KME's certificate, private key and CA: from files to TLS contexts, and whether the files have changed since."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from keysource import tls
from keysource.kme import tlsfiles
from keysource.kme.config import ConfigError, KmeConfig
from keysource.kme.tlsfiles import Fingerprint

_FILES = ("ca", "certificate", "private_key")


def contexts(config: KmeConfig) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for the listeners, and for calls to other KMEs.  Raises :class:`ConfigError`."""
    ca, certificate, private_key = (
        _read(config, name, getattr(config.kme, name), secret=name == "private_key") for name in _FILES
    )
    try:
        return tls.server_context(ca, certificate, private_key), tls.client_context(ca, certificate, private_key)
    except ValueError as error:
        raise ConfigError(f"[kme]: {error}") from None


def expired_context(config: KmeConfig) -> ssl.SSLContext:
    """What the fault ``expired-certificate`` shows: the file beside our certificate, as ``qvpn-kme pair`` writes it.

    Raises :class:`ConfigError`."""
    name = os.fspath(Path(config.kme.certificate).with_suffix(".expired.crt"))
    if not config.path(name).exists():
        raise ConfigError(
            f"the fault expired-certificate needs {config.path(name)}: a certificate of the same private key"
            " whose time is over; qvpn-kme pair writes one"
        )
    ca, certificate, private_key = (
        _read(config, "ca", config.kme.ca),
        _read(config, "certificate", name),
        _read(config, "private_key", config.kme.private_key, secret=True),
    )
    try:
        return tls.server_context(ca, certificate, private_key)
    except ValueError as error:
        raise ConfigError(f"{config.path(name)}: {error}") from None


def fingerprint(config: KmeConfig) -> Fingerprint:
    """Differs when one of the files was written or replaced."""
    return tlsfiles.fingerprint_of(config.path(getattr(config.kme, name)) for name in _FILES)


def not_after(config: KmeConfig) -> str:
    """When our certificate ends, ISO 8601; empty where that cannot be read."""
    return tlsfiles.not_after(config.path(config.kme.certificate))


def _read(config: KmeConfig, key: str, name: str, *, secret: bool = False) -> bytes:
    return tlsfiles.read_file("[kme]", key, config.path(name), secret=secret)
