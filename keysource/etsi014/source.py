"""Keys from a KME that speaks ETSI GS QKD 014 V1.1.1, as a :class:`~keysource.base.KeySource`."""

from __future__ import annotations

from collections.abc import Mapping

from keysource.base import Key, Origin, SaePair, SourceContext, SourceStatus, wipe
from keysource.errors import BadAnswer, BadSettings, KeySourceError, Unavailable
from keysource.etsi014.client import Etsi014Client
from keysource.etsi014.messages import DeliveredKey, Extension, StatusAnswer
from keysource.etsi014.settings import check_sae, settings_untrusted
from keysource.remote import agreed_origin, load_files, tls_context
from keysource.seen import SeenKeys
from keysource.tls import must_name

_MAX_HOPS = 255


class Etsi014Source:
    """One KME, one local SAE.  For checks before the start: ``settings`` (``hop``, ``harvestable``, ``host``)."""

    def __init__(self, settings: Mapping[str, object], context: SourceContext) -> None:
        self.settings = settings_untrusted(settings)
        self._context = context
        self._client: Etsi014Client | None = None
        self._seen = SeenKeys()

    async def start(self) -> None:
        """Load the certificates.  A KME that does not answer yet is no error: ``status`` says so.

        Raises:
            BadSettings: a file is missing, is no PEM, has a wrong mode; or ``hop`` claims what cannot be checked.
        """
        if self._client is not None:
            return
        context = await tls_context(self.settings, self._context)
        if self.settings.kme is not None:
            must_name(context, self.settings.kme)
        self._client = Etsi014Client(self.settings.url, context, method=self.settings.method)

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
        """From GET status and, where the KME is ours, from its ``status_extension``."""
        try:
            answer = await self._opened().status(_peer(peer_sae))
        except KeySourceError as error:
            return self._status(False, str(error))
        try:
            origin = self._origin(answer.extension)
        except BadAnswer as error:
            return self._status(False, f"{self.settings.url}: {error}")
        alarm = _text(answer.extension.get("qvpn_alarm"))
        reason = _not_ready(answer, alarm)
        return self._status(not reason, reason, origin=origin, alarm=alarm, answer=answer)

    async def get_key(self, peer_sae: str) -> Key:
        delivered = await self._opened().enc_keys(_peer(peer_sae))
        return self._accept(delivered[0])

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        delivered = await self._opened().dec_keys(_peer(peer_sae), [key_id])
        return self._accept(delivered[0])

    def _accept(self, delivered: DeliveredKey) -> Key:
        try:
            origin, hops = self._origin(delivered.extension), _hops(delivered.extension)
            self._seen.check(delivered.key_id, delivered.material)
        except BadAnswer as error:
            wipe(delivered.material)
            raise type(error)(f"{self.settings.url}: {error}") from None
        return Key(delivered.key_id, delivered.material, origin, hops)

    def _origin(self, extension: Extension) -> Origin:
        return agreed_origin(self.settings.origin, extension.get("qvpn_origin"), "the KME")

    def _status(
        self,
        ready: bool,
        reason: str,
        *,
        origin: Origin | None = None,
        alarm: str | None = None,
        answer: StatusAnswer | None = None,
    ) -> SourceStatus:
        extension = answer.extension if answer else {}
        return SourceStatus(
            ready=ready,
            reason=reason,
            origin=origin or self.settings.origin,
            hop=self.settings.hop,
            stored_keys=answer.stored_key_count if answer else None,
            key_rate=_real(extension.get("qvpn_key_rate")),
            alarm=alarm,
            qber=_real(extension.get("qvpn_qber")),
            survives_harvest=not self.settings.harvestable,
        )

    def _opened(self) -> Etsi014Client:
        if self._client is None:
            raise Unavailable(f"key source {self._context.name!r} is not started", answered=True)
        return self._client


def _peer(peer_sae: str) -> str:
    try:
        return check_sae(peer_sae)
    except ValueError as error:
        raise BadSettings(f"sae: {error}", key="sae") from None


def _not_ready(answer: StatusAnswer, alarm: str | None) -> str:
    """Empty where a draw may be tried.  A foreign KME's count does not decide: as slave we may well have none."""
    if alarm is not None:
        return f"the KME reports an alarm: {alarm}"
    if answer.extension.get("qvpn_held_keys") == 0:
        return "the KME holds no keys for this pair"
    return ""


def _hops(extension: Extension) -> int:
    hops = extension.get("qvpn_hops", 0)
    if not isinstance(hops, int) or isinstance(hops, bool) or not 0 <= hops <= _MAX_HOPS:
        raise BadAnswer("the KME names a number of hops that is none")
    return hops


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else " " for c in value[:200])


def _real(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    return None
