"""Which key exchange groups a server of ours takes from strangers: two ends in memory."""

from __future__ import annotations

import ssl

import pytest

from keysource import tls
from keysource.kme.pki import Authority

pytestmark = pytest.mark.skipif(
    ssl.OPENSSL_VERSION_INFO >= (3, 5), reason="this OpenSSL has no slow groups among its defaults"
)


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> str:
    """The cipher that both agree on.  Raises ``ssl.SSLError``."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    cipher = ends[1].cipher()
    assert cipher is not None
    return cipher[0]


@pytest.mark.parametrize(
    ("curve", "served"), [(None, True), ("prime256v1", True), ("secp384r1", False), ("X448", False)]
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_takes_the_group_that_everybody_has_and_no_other(
    curve: str | None, served: bool, version: ssl.TLSVersion
) -> None:
    authority = Authority("ca")
    kme, sae = authority.kme("kme", ["127.0.0.1"]), authority.sae("sae")
    server = tls.server_context(authority.certificate, kme.certificate, kme.private_key)
    client = tls.client_context(authority.certificate, sae.certificate, sae.private_key)
    client.minimum_version = client.maximum_version = version
    if curve is not None:
        client.set_ecdh_curve(curve)
    if served:
        assert "GCM" in shake(client, server)
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)no shared|no suitable"):
            shake(client, server)
