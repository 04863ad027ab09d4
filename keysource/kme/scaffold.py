"""``qvpn-kme pair``: configurations and a test PKI for two KMEs, one folder per site, to be copied to two hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keysource.etsi014.settings import check_sae
from keysource.kme.pki import Authority, write_new
from keysource.settings import Address


class ScaffoldError(Exception):
    """Nothing (more) was written; one sentence."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site of a pair.  ``sae_host`` is where SAEs reach the KME, ``host`` where the other KME does."""

    name: str
    host: str
    port: int = 8443
    peer_port: int = 8444
    sae_host: str = ""
    device: str = "link/device.sock"
    """Path of the device socket, relative to the site's folder."""

    @property
    def kme_id(self) -> str:
        return f"kme-{self.name}"

    @property
    def sae_id(self) -> str:
        return f"sae-{self.name}"

    @property
    def listen(self) -> str:
        return str(Address(host=self.sae_host or self.host, port=self.port))

    @property
    def peer_listen(self) -> str:
        return str(Address(host=self.host, port=self.peer_port))

    @property
    def url(self) -> str:
        """For the ``url`` of an ``etsi014`` key source."""
        return f"https://{self.listen}"


def write_pair(folder: Path, left: SitePlan, right: SitePlan, authority: Authority | None = None) -> list[Path]:
    """Write ``folder/NAME/kme.toml`` and ``folder/NAME/pki/`` for both; returns the two configuration files.

    Without an ``authority`` a new one signs both sites and is forgotten.

    Raises:
        ScaffoldError: a name or a port does not do, or a file is there already.
    """
    _check(left, right)
    for site in (left, right):
        for taken in (folder / site.name / "kme.toml", folder / site.name / "pki"):
            if taken.exists():
                raise ScaffoldError(f"{taken}: exists already")
    authority = authority or Authority(f"test CA of {left.name} and {right.name}")
    try:
        return [_write_site(folder, authority, site, other) for site, other in ((left, right), (right, left))]
    except OSError as error:
        raise ScaffoldError(f"{error.filename}: {error.strerror}") from None


def _write_site(folder: Path, authority: Authority, site: SitePlan, other: SitePlan) -> Path:
    home = folder / site.name
    pki = home / "pki"
    pki.mkdir(mode=0o700, parents=True)
    write_new(pki / "ca.crt", authority.certificate, 0o644)
    kme = authority.kme(site.kme_id, [site.sae_host or site.host, site.host])
    kme.write(pki, site.kme_id)
    write_new(pki / f"{site.kme_id}.expired.crt", authority.expired(kme), 0o644)  # for a fault on order
    authority.sae(site.sae_id).write(pki, site.sae_id)
    file = home / "kme.toml"
    write_new(file, _toml(site, other).encode(), 0o644)
    return file


def _toml(site: SitePlan, other: SitePlan) -> str:
    return f"""\
# KME of site {site.name}: `qvpn-kme serve kme.toml`; every table is explained by `qvpn-kme example`.
# The certificates in pki/ are for tests: the key of their authority was never written.
version = 1

[kme]
id = "{site.kme_id}"
listen = "{site.listen}"            # for SAEs: ETSI GS QKD 014
peer_listen = "{site.peer_listen}"  # for {other.kme_id}
certificate = "pki/{site.kme_id}.crt"
private_key = "pki/{site.kme_id}.key"
ca = "pki/ca.crt"
store = "kme-state/kme.sqlite"

[[peer_kme]]
id = "{other.kme_id}"
url = "https://{other.peer_listen}"
saes = ["{other.sae_id}"]

[[link]]
device = "{site.device}"
peer_kme = "{other.kme_id}"

[[sae]]
id = "{site.sae_id}"                # pki/{site.sae_id}.crt and .key are its credential
may_share_with = ["{other.sae_id}"]
"""


def _check(left: SitePlan, right: SitePlan) -> None:
    if left.name == right.name:
        raise ScaffoldError(f"both sites have the name {left.name!r}")
    listeners = [(s.sae_host or s.host, s.port) for s in (left, right)]
    listeners += [(s.host, s.peer_port) for s in (left, right)]
    if len(set(listeners)) < len(listeners):
        raise ScaffoldError("two listeners have the same host and port")
    for site in (left, right):
        try:
            check_sae(site.sae_id)
        except ValueError as error:
            raise ScaffoldError(str(error)) from None
        if not site.name.replace("-", "").replace("_", "").isalnum():
            raise ScaffoldError(f"{site.name!r}: a site's name is letters, digits, - and _")
        for text in (site.host, site.sae_host, site.device):
            if any(c in text for c in '"\\\n') or not text.isprintable():
                raise ScaffoldError(f"{text!r} cannot stand in a configuration file")
        if not site.host or not site.device:
            raise ScaffoldError(f"site {site.name!r} needs a host and a device socket")
        if not 1 <= site.port <= 65535 or not 1 <= site.peer_port <= 65535:
            raise ScaffoldError("a port is a number from 1 to 65535")
