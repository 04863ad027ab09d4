"""The certificate that the outer QUIC shows.  Nothing rests on it: peers prove who they are inside."""

from __future__ import annotations

import datetime
import hashlib
import ssl
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qvpn.transports.base import BadTransport

LIFE = datetime.timedelta(days=3650)
"""Of one that is made here: who pins it must not find another one soon."""

EARLIER = datetime.timedelta(days=1)
"""Other machines' clocks may be behind."""


@dataclass(frozen=True)
class Certificate:
    """A certificate, what stands between it and its root, and its key."""

    leaf: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    private_key: Any


def fingerprint(leaf: x509.Certificate) -> bytes:
    """SHA-256 of a certificate: what the other side can pin."""
    return hashlib.sha256(leaf.public_bytes(serialization.Encoding.DER)).digest()


def self_made(name: str) -> Certificate:
    """A new certificate for ``name`` on P-256, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate(made, (), key)


def load(certificate: bytes, private_key: bytes) -> Certificate:
    """From PEM as ACME clients write it: the certificate first, then its chain; the key without a passphrase.

    Raises :class:`BadTransport`.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate)
    except ValueError:
        raise BadTransport("holds no certificate in PEM", key="certificate") from None
    try:
        key = serialization.load_pem_private_key(private_key, None)
    except (ValueError, TypeError):
        raise BadTransport("holds no private key in PEM without a passphrase", key="private_key") from None
    if _spki(key.public_key()) != _spki(chain[0].public_key()):
        raise BadTransport("is not the key of the certificate", key="private_key")
    return Certificate(chain[0], tuple(chain[1:]), key)


def to_pem(made: Certificate) -> bytes:
    """The private key, then the certificate: what :func:`load` takes twice."""
    key = made.private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return bytes(key) + made.leaf.public_bytes(serialization.Encoding.PEM)


def _spki(public: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(public.public_bytes(serialization.Encoding.DER, form))


NOT_VERIFIED = ssl.CERT_NONE
