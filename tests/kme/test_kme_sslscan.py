"""What a TLS scanner finds at a KME.  ``sslscan`` is Debian's; the test is skipped where it is not installed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.skipif(shutil.which("sslscan") is None, reason="apt install sslscan")
STILL_GOOD = 128
"""Bits of the weakest group."""


async def scan(lab, address):
    pki = lab.folder / "alice" / "pki"
    options = ["--xml=-", "--show-sigs", f"--certs={pki / 'sae-alice.crt'}", f"--pk={pki / 'sae-alice.key'}"]
    process = await asyncio.create_subprocess_exec(
        "sslscan", *options, address, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    said, complained = await process.communicate()
    assert process.returncode == 0, complained
    [test] = ElementTree.fromstring(said).iter("ssltest")
    return test


def versions(test):
    return {
        f"{protocol.get('type')}{protocol.get('version')}": protocol.get("enabled") == "1"
        for protocol in test.iter("protocol")
    }


async def test_sslscan_finds_nothing_to_complain_about(make_lab):
    lab = make_lab()
    file = lab.files["alice"]
    file.write_text(file.read_text().replace("[kme]\n", '[kme]\nskip_listen = "127.0.0.1:0"\n', 1))
    await lab.start(keys=0)
    status = lab.status("alice")
    for listener in ("listen", "peer_listen", "skip_listen"):
        test = await scan(lab, status[listener])
        both = {"ssl2": False, "ssl3": False, "tls1.0": False, "tls1.1": False, "tls1.3": True}
        assert versions(test) == both | {"tls1.2": listener != "skip_listen"}
        assert all(found.get("vulnerable") == "0" for found in test.iter("heartbleed"))
        assert all(found.get("supported") == "0" for found in test.iter("renegotiation"))
        assert all(found.get("supported") != "1" for found in test.iter("compression"))
        ciphers = list(test.iter("cipher"))
        assert "TLSv1.3" in {cipher.get("sslversion") for cipher in ciphers}
        for cipher in ciphers:
            assert cipher.get("strength") in ("strong", "acceptable")
            assert any(aead in cipher.get("cipher") for aead in ("GCM", "POLY1305"))
            assert cipher.get("curve") or int(cipher.get("dhebits", 0)) >= 2048  # forward secrecy
        groups = list(test.iter("group"))
        assert groups
        assert all(int(group.get("bits")) >= STILL_GOOD for group in groups)
        assert not any(group.get("name").startswith("ffdhe") for group in groups)
        [certificate] = (found for found in test.iter("certificate") if found.get("type") == "short")
        assert certificate.findtext("expired") == "false"
        assert certificate.findtext("self-signed") == "false"
        assert "SHA256" in certificate.findtext("signature-algorithm")
