"""Who calls: the SAE or KME that a client certificate names.  TLS has checked the chain by then."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from aiohttp import web


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The one common name of a certificate as ``ssl`` describes it; None where there is none or more than one."""
    names = [
        str(value) for part in (certificate or {}).get("subject", ()) for name, value in part if name == "commonName"
    ]
    return names[0] if len(names) == 1 else None


def caller(request: web.Request) -> str | None:
    """The common name behind a request; None where TLS knows none."""
    connection: ssl.SSLObject | None = request.get_extra_info("ssl_object")
    return common_name(connection.getpeercert()) if connection else None
