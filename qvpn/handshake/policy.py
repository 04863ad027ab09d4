"""What a side accepts (PROTOCOL.md, chapter 7).  Pure functions; the clock is an argument."""

from __future__ import annotations

from qvpn.handshake.chain import Link
from qvpn.handshake.parameters import PeerParameters
from qvpn.wire.messages import Mode, Outcome, Policy, WireOrigin


def origin_allowed(parameters: PeerParameters, origin: WireOrigin) -> bool:
    """``require-qkd`` takes a simulated key only where the operator wrote ``allow_simulated``."""
    return origin is not WireOrigin.SIMULATED or parameters.allow_simulated or parameters.mode is not Mode.REQUIRE_QKD


def chained_allowed(parameters: PeerParameters, peer: Policy, link: Link | None, now: float) -> bool:
    """Whether CHAINED may be the outcome: both sides want it and the chain holds a key that is young enough."""
    if Mode.PQC_ONLY in (parameters.mode, peer.mode) or link is None or link.qkd_at is None:
        return False
    age = min(parameters.max_qkd_age, peer.max_qkd_age)
    if age == 0 or link.qkd_origin is None or not origin_allowed(parameters, link.qkd_origin):
        return False
    return now - link.qkd_at < age


def decide_none(parameters: PeerParameters, peer: Policy, link: Link | None, now: float, degraded: bool) -> Outcome:
    """R's answer to a signed n = 0.  ``degraded``: ``max_degraded`` still lets us run on PQC."""
    if chained_allowed(parameters, peer, link, now):
        return Outcome.CHAINED
    if Mode.REQUIRE_QKD in (parameters.mode, peer.mode):
        return Outcome.REFUSED
    return Outcome.ABSENT if degraded or parameters.mode is Mode.PQC_ONLY else Outcome.REFUSED


def may_send_none(parameters: PeerParameters, peer: Policy, link: Link | None, now: float, degraded: bool) -> bool:
    """Whether I may go on without a key.  ``degraded``: ``max_degraded`` still lets us run on PQC."""
    if parameters.mode is Mode.PQC_ONLY:
        return True
    if chained_allowed(parameters, peer, link, now):
        return True
    return parameters.mode is Mode.PREFER_QKD and degraded


def accepts(
    parameters: PeerParameters, peer: Policy, outcome: Outcome, link: Link | None, now: float, degraded: bool
) -> bool:
    """I's check of a signed CHAINED or ABSENT by its own mode and clock."""
    if outcome is Outcome.CHAINED:
        return chained_allowed(parameters, peer, link, now)
    return parameters.mode is not Mode.REQUIRE_QKD and (parameters.mode is Mode.PQC_ONLY or degraded)
