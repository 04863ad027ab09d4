"""``type = "skip"``: keys of a key provider that speaks Cisco's SKIP (draft-cisco-skip-02, ``messages``).

::

    url = "https://192.0.2.9:8443"
    sae = "router-left"                 # our localSystemID there; the peer's `sae` is its remoteSystemID
    ca = "ca.crt"                       # mutual TLS 1.3 with certificates
    certificate = "router-left.crt"
    private_key = "router-left.key"
    origin = "qkd"                      # SKIP does not say it: what you know; nothing said: external
    hop = "zone"                        # local | zone | pq-tls | classical-tls (default)
    accept_harvestable_hop = false

TLS-PSK, which the draft recommends as an alternative, is missing: Python's ``ssl`` has it from 3.13 on only.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import field_validator

from keysource.base import Key, Origin, SaePair, SourceContext, SourceStatus, wipe
from keysource.errors import BadAnswer, BadSettings, KeySourceError, Unavailable
from keysource.remote import RemoteTable, agreed_origin, check_url, load_files, tls_context
from keysource.seen import SeenKeys
from keysource.settings import parse_settings
from keysource.skip.client import Said, SkipClient


class SkipSettings(RemoteTable):
    """The table ``[key_source.NAME]`` without ``type``."""

    sae: str
    psk: str | None = None

    @field_validator("url")
    @classmethod
    def _https(cls, value: str) -> str:
        return check_url(value, "https", path=True, port=False)

    @field_validator("sae")
    @classmethod
    def _system(cls, value: str) -> str:
        return check_system(value)

    @field_validator("psk")
    @classmethod
    def _no_psk(cls, value: str | None) -> None:
        raise ValueError("TLS-PSK is missing in this version, certificates are what it has")


def check_system(value: str) -> str:
    """A system ID.  Raises ``ValueError``."""
    if not 1 <= len(value) <= 200 or not value.isprintable():
        raise ValueError("a system ID has 1 to 200 printable characters")
    return value


class SkipSource:
    """One key provider, one local system."""

    def __init__(self, settings: Mapping[str, object], context: SourceContext) -> None:
        self.settings = parse_settings(SkipSettings, settings)
        self._context = context
        self._client: SkipClient | None = None
        self._seen = SeenKeys()
        self._said_origin: Origin | None = None

    async def start(self) -> None:
        """Load the certificates.  A key provider that does not answer yet is no error: ``status`` says so.

        Raises:
            BadSettings: a file is missing, is no PEM, has a wrong mode; or ``hop`` claims what cannot be checked.
        """
        if self._client is None:
            self._client = SkipClient(self.settings.url, await tls_context(self.settings, self._context))

    def check_files(self) -> None:
        """See :class:`keysource.base.Checkable`."""
        load_files(self.settings, self._context)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair(self.settings.sae, peer_sae)

    async def status(self, peer_sae: str) -> SourceStatus:
        """From ``/capabilities``; SKIP tells no stock, rate or alarm."""
        try:
            said = await self._opened().capabilities()
        except KeySourceError as error:
            return self._status(str(error))
        if said.local_system != self.settings.sae:
            return self._status(f"{self.settings.url}: our system is called {said.local_system[:60]!r} there")
        if not said.key or not said.knows(peer_sae):
            return self._status(f"{self.settings.url}: the key provider has no keys for system {peer_sae!r}")
        return self._status("")

    async def get_key(self, peer_sae: str) -> Key:
        return self._accept(await self._opened().new_key(_peer(peer_sae)))

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        return self._accept(await self._opened().key(_peer(peer_sae), key_id))

    def _accept(self, said: Said) -> Key:
        try:
            origin, hops = agreed_origin(self.settings.origin, said.origin, "the key provider"), _hops(said.hops)
            self._seen.check(said.key.key_id, said.key.material)
        except BadAnswer as error:
            wipe(said.key.material)
            raise type(error)(f"{self.settings.url}: {error}") from None
        if said.origin is not None:
            self._said_origin = origin
        return Key(said.key.key_id, said.key.material, origin, hops)

    def _status(self, reason: str) -> SourceStatus:
        return SourceStatus(
            ready=not reason,
            reason=reason,
            origin=self.settings.origin or self._said_origin,
            hop=self.settings.hop,
            survives_harvest=not self.settings.harvestable,
        )

    def _opened(self) -> SkipClient:
        if self._client is None:
            raise Unavailable(f"key source {self._context.name!r} is not started", answered=True)
        return self._client


def _peer(peer_sae: str) -> str:
    try:
        return check_system(peer_sae)
    except ValueError as error:
        raise BadSettings(f"sae: {error}", key="sae") from None


def _hops(said: str | None) -> int:
    if said is None:
        return 0
    if not said.isascii() or not said.isdigit() or len(said) > 3 or int(said) > 255:
        raise BadAnswer("the key provider names a number of hops that is none")
    return int(said)
