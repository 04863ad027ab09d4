"""Who calls: the SAE or KME that a certificate names.  TLS has checked the chain by then."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

Certificate = Mapping[str, Any] | None
"""As ``ssl`` describes it."""


def common_name(certificate: Certificate) -> str | None:
    """The one common name of a certificate; None where there is none or more than one."""
    names = [
        str(value) for part in (certificate or {}).get("subject", ()) for name, value in part if name == "commonName"
    ]
    return names[0] if len(names) == 1 else None


def uri_name(certificate: Certificate, prefix: str) -> str | None:
    """What stands after ``prefix`` in the one URI that begins so; None where there is none or more than one."""
    names = uri_names(certificate, prefix)
    return names[0] if len(names) == 1 and names[0] else None


def uri_names(certificate: Certificate, prefix: str) -> list[str]:
    """What stands after ``prefix`` in every URI of a certificate that begins so."""
    return [
        str(value)[len(prefix) :]
        for kind, value in (certificate or {}).get("subjectAltName", ())
        if kind == "URI" and str(value).startswith(prefix)
    ]


def sae_reader(source: str, prefix: str) -> Callable[[Certificate], str | None]:
    """How the SAE ID is read from a certificate; ``source`` is ``cn`` or ``san-uri``."""
    if source == "san-uri":
        return lambda certificate: uri_name(certificate, prefix)
    return common_name


def certificate_of(request: web.Request) -> Certificate:
    """The certificate behind a request; None where TLS knows none."""
    connection: ssl.SSLObject | None = request.get_extra_info("ssl_object")
    return connection.getpeercert() if connection else None


def must_be(context: ssl.SSLContext, name: str) -> ssl.SSLContext:
    """Let a client context believe only a server whose certificate has this common name.

    It is asked at the end of the handshake, before a byte of the request has gone out.
    """

    class Named(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            if common_name(self.getpeercert()) != name:
                raise ssl.SSLCertVerificationError(f"the certificate is not that of {name!r}")

    context.sslobject_class = Named
    return context
