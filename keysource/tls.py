"""TLS as ETSI GS QKD 014 clause 5.1 asks for it: mutual, 1.2 or newer; here with AEAD suites only.

One CA file is trusted and nothing else; the server's name is checked.  PEM comes in as bytes, so that whoever reads
files can check their modes; OpenSSL gets them through a memory file that no other process can open by a path.
"""

from __future__ import annotations

import os
import ssl
from typing import Any, NoReturn

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; every suite of TLS 1.3 is an AEAD already."""


def client_context(ca: bytes, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    """For an SAE, or a KME that calls its peer.  Raises ``ValueError``, one sentence."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    return _fill(context, ca, certificate, private_key)


def server_context(ca: bytes, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    """For a KME: a client without a certificate of this CA does not get through.  Raises ``ValueError``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    _only_quick_groups(context)
    return _fill(context, ca, certificate, private_key)


def _only_quick_groups(context: ssl.SSLContext) -> None:
    """Whoever connects chooses the group of the key exchange, before any certificate: ffdhe8192 would cost a server
    about 170 ms for each stranger.

    OpenSSL leaves the large ones out by itself from 3.5 on.  Before, Python can only name a single group: the one
    that every TLS 1.3 must have (RFC 8446, 9.1).
    """
    if group_is_readable():
        loose: Any = context
        loose.set_groups("?X25519MLKEM768:?SecP256r1MLKEM768:?SecP384r1MLKEM1024:X25519:P-256:P-384:P-521")
    elif ssl.OPENSSL_VERSION_INFO < (3, 5):
        context.set_ecdh_curve("prime256v1")


def _fill(context: ssl.SSLContext, ca: bytes, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ValueError("the CA file has no certificate in PEM") from None
    # (certificate and key in one file: OpenSSL takes the first block of the kind that it looks for)
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(certificate + b"\n" + private_key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_no_password)
    except ssl.SSLError as error:
        raise ValueError(f"certificate and private key do not load: {_reason(error)}") from None
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)
    return context


def _no_password() -> NoReturn:
    raise ValueError("the private key is encrypted; it must be a plain PEM file with mode 0600")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not PEM").lower().replace("_", " ")


def group_is_readable() -> bool:
    """Can this Python tell which key exchange group a connection negotiated, and restrict it beforehand?"""
    return hasattr(ssl.SSLObject, "group") and hasattr(ssl.SSLContext, "set_groups")


def restrict_to_post_quantum(context: ssl.SSLContext) -> None:
    """Only X25519MLKEM768 and its like.  Raises ``ValueError`` where that could not be read back."""
    if not group_is_readable():
        raise ValueError(
            f"this Python with {ssl.OPENSSL_VERSION} cannot tell which TLS group was negotiated, so nobody can say"
            " that the hop is post-quantum"
        )
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    loose: Any = context
    loose.set_groups("X25519MLKEM768:SecP256r1MLKEM768:SecP384r1MLKEM1024")


def must_name(context: ssl.SSLContext, name: str) -> ssl.SSLContext:
    """Let a client context believe only a server whose certificate has this common name or alternative name (DNS or
    URI).  It is asked at the end of the handshake, before a byte of a request has gone out.
    """

    class Named(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            if name not in names_of(self):
                error: Any = ssl.SSLCertVerificationError(1, "another name")
                error.verify_message = f"it does not name {name!r}"
                raise error

    context.sslobject_class = Named
    return context


def names_of(connection: ssl.SSLObject) -> set[str]:
    """Common and alternative names (DNS, URI) of the certificate at the other end."""
    shown: Any = connection.getpeercert() or {}
    names = {str(value) for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"}
    return names | {str(value) for kind, value in shown.get("subjectAltName", ()) if kind in ("DNS", "URI")}


def negotiated_group(connection: ssl.SSLObject | None) -> str | None:
    """Name of the group of a connection; None where it cannot be read."""
    read = getattr(connection, "group", None)
    return str(read()) if callable(read) else None
