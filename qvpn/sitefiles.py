"""A site's configuration together with every file that it names, read and checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qvpn import privileged
from qvpn.config.errors import ConfigError, IdentityError
from qvpn.config.identity import Identity, PublicIdentity, parse_private, parse_psk, parse_public
from qvpn.config.load import parse_config
from qvpn.config.schema import Config, Peer
from qvpn.crypto.suites import SUITES
from qvpn.privileged import PrivilegedError

T = TypeVar("T")

_ALGORITHM = {3: "ML-DSA-65", 5: "ML-DSA-87"}


@dataclass(frozen=True)
class PeerKeys:
    """What this site knows of a peer."""

    public: tuple[PublicIdentity, ...]
    psk: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SiteFiles:
    """Everything on disk that the daemon needs, in memory."""

    config: Config
    identity: Identity
    peers: dict[str, PeerKeys]


def load_config(file: Path) -> Config:
    """Read and check the TOML file alone.  Raises ConfigError."""
    try:
        data = privileged.read_public(file)
    except PrivilegedError as error:
        raise ConfigError(str(error)) from None
    return parse_config(data, file)


def load_site(file: Path) -> SiteFiles:
    """Read the configuration and all keys.  Raises ConfigError that names file, table and key."""
    config = load_config(file)
    identity = _read(config, "[site]", "identity", config.site.identity, privileged.read_secret, parse_private)
    peers = {peer.name: _load_peer(config, peer) for peer in config.peer}
    site = SiteFiles(config, identity, peers)
    _check_levels(site)
    _check_distinct(site)
    return site


def _load_peer(config: Config, peer: Peer) -> PeerKeys:
    table = _table(peer)
    public = tuple(
        _read(config, table, "public_key", path, privileged.read_public, parse_public) for path in peer.public_key
    )
    psk = None if peer.psk is None else _read(config, table, "psk", peer.psk, privileged.read_secret, parse_psk)
    return PeerKeys(public, psk)


def _read(
    config: Config, table: str, key: str, path: str, read: Callable[[Path], bytes], parse: Callable[[bytes], T]
) -> T:
    place = config.path(path)
    try:
        return parse(read(place))
    except IdentityError as error:
        raise ConfigError(f"{place} {error.problem}", file=config.file, table=table, key=key) from None
    except PrivilegedError as error:
        raise ConfigError(str(error), file=config.file, table=table, key=key) from None


def _check_levels(site: SiteFiles) -> None:
    """Suites, own identity and the peer's must belong together."""
    for peer in site.config.peer:
        level = SUITES[peer.suites[0]].level
        if site.identity.level != level:
            problem = f"suite {peer.suites[0]} needs an {_ALGORITHM[level]} identity, and this site's is "
            raise _wrong(site, peer, "suites", problem + _ALGORITHM[site.identity.level])
        for path, public in zip(peer.public_key, site.peers[peer.name].public, strict=True):
            if public.level != level:
                problem = (
                    f"{site.config.path(path)} has an {_ALGORITHM[public.level]} key, and suite {peer.suites[0]} "
                )
                raise _wrong(site, peer, "public_key", problem + f"needs {_ALGORITHM[level]}")


def _check_distinct(site: SiteFiles) -> None:
    seen = {site.identity.public.fingerprint: "it is this site's own public key"}
    for peer in site.config.peer:
        for public in site.peers[peer.name].public:
            if public.fingerprint in seen:
                raise _wrong(site, peer, "public_key", seen[public.fingerprint])
            seen[public.fingerprint] = f'peer "{peer.name}" has the same public key'


def _wrong(site: SiteFiles, peer: Peer, key: str, problem: str) -> ConfigError:
    return ConfigError(problem, file=site.config.file, table=_table(peer), key=key)


def _table(peer: Peer) -> str:
    return f'[[peer]] "{peer.name}"'
