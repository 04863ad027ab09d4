"""From living objects to the snapshots of :mod:`qvpn.status`."""

from __future__ import annotations

from collections.abc import Sequence

from qvpn.control.agent import PeerAgent
from qvpn.control.forecast import lasts
from qvpn.control.pathprobe import PathProber
from qvpn.control.supervisor import SourceKeeper
from qvpn.dataplane.plane import tunnel_mtu
from qvpn.dataplane.stats import PeerTraffic
from qvpn.handshake.machine import Snapshot
from qvpn.lanes.counts import add, lane_traffic, summed
from qvpn.lanes.lanes import LaneState
from qvpn.lanes.messages import LaneTraffic
from qvpn.sitefiles import PeerKeys
from qvpn.status import SIMULATED, EpochView, LaneView, PathView, PeerLaneView, PeerView, SourceView, key_id_hash
from qvpn.tunnel.epoch import EpochRole
from qvpn.tunnel.keys import EpochState


def peer_view(
    agent: PeerAgent, keys: PeerKeys, traffic: PeerTraffic, lanes: dict[int, LaneTraffic], now: float
) -> PeerView:
    """One peer: what its agent remembers and what the packet paths of all lanes counted."""
    peer, record = agent.peer, agent.record
    handshake = agent.machine.snapshot(now)
    epoch = _epoch_view(handshake, traffic, now)
    each = {0: lane_traffic(traffic, up=epoch is not None and traffic.endpoint is not None), **lanes}
    total = LaneTraffic()
    for lane in each.values():
        total = add(total, lane)
    return PeerView(
        name=peer.name,
        state=epoch.state if epoch is not None else EpochState.BLOCKED.value,
        policy=peer.policy.value,
        fingerprint=keys.public[0].readable,
        endpoint=None if agent.endpoint is None else str(agent.endpoint),
        key_source=peer.key_source,
        epoch=epoch,
        simulated=None if epoch is None else epoch.simulated,
        last_handshake=None if record.confirmed_at is None else now - record.confirmed_at,
        rekeys=max(0, handshake.epochs - 1),
        epochs=handshake.epochs,
        keys_used=handshake.keys_used,
        handshake_seconds=record.handshake_seconds,
        failures=record.failures,
        last_failure=record.last_failure,
        alarms=record.alarms,
        last_alarm=record.last_alarm,
        sent_packets=total.sent_packets,
        sent_bytes=total.sent_bytes,
        received_packets=total.received_packets,
        received_bytes=total.received_bytes,
        last_received=None if traffic.last_received is None else now - traffic.last_received,
        opened=total.opened,
        marked=total.marked,
        source_checks=total.source_checks,
        tun_writes=total.tun_writes,
        tun_refused=total.tun_refused,
        path=_path_view(agent.path, now),
        drops=summed(total.drops, record.drops.nonzero()),
        carrier=None if agent.endpoint is None else agent.endpoint.carrier,
        transports=peer.transport,
        carrier_changes=record.carrier_changes,
        lanes=tuple(_peer_lane(number, lane) for number, lane in each.items()) if lanes else (),
    )


def _peer_lane(number: int, lane: LaneTraffic) -> PeerLaneView:
    return PeerLaneView(
        number=number,
        up=lane.up,
        endpoint=lane.endpoint,
        sent_packets=lane.sent_packets,
        sent_bytes=lane.sent_bytes,
        received_packets=lane.received_packets,
        received_bytes=lane.received_bytes,
        drops=lane.drops,
    )


def lane_view(state: LaneState) -> LaneView:
    """One lane's process."""
    return LaneView(
        number=state.number,
        port=state.port,
        pid=state.pid,
        up=state.up,
        used=state.attached,
        restarts=state.restarts,
        reason=state.reason,
    )


def _path_view(path: PathProber, now: float) -> PathView | None:
    search = path.search
    if search is None:
        return None
    found = "link" if search.assumed else "probe" if search.settled else "searching"
    return PathView(
        mtu=search.size + path.headers,
        inner_mtu=tunnel_mtu(search.size),
        link_mtu=search.ceiling + path.headers,
        found=found,
        age=now - search.changed_at,
        probes=search.sent,
        answers=search.replies,
        falls=search.falls,
        echoed=path.echoed,
    )


def _epoch_view(handshake: Snapshot, traffic: PeerTraffic, now: float) -> EpochView | None:
    """The epoch that packets leave under; None: nothing leaves."""
    current = next((e for e in traffic.epochs if e.role is EpochRole.CURRENT and now < e.hard_end), None)
    if current is None:
        return None
    key, next_rekey = handshake.key, handshake.next_rekey
    return EpochView(
        number=current.number,
        state=current.state.value,
        role="initiator" if current.initiator else "responder",
        age=current.age,
        hard_end_in=current.hard_end - now,
        next_rekey_in=None if next_rekey is None else max(0.0, next_rekey - now),
        origin=None if key is None else key.origin.name.lower(),
        key_id_hash=None if key is None else key_id_hash(key.key_id),
        simulated=SIMULATED if handshake.simulated else None,
    )


def source_view(keeper: SourceKeeper, rekeys: Sequence[float] = ()) -> SourceView:
    """One key source, as it last said; while it is not open, why.  ``rekeys`` are the intervals of its peers."""
    status = keeper.last
    return SourceView(
        name=keeper.name,
        type=keeper.kind,
        ready=status.ready and keeper.problem is None,
        reason=keeper.problem or status.reason,
        origin=None if status.origin is None else status.origin.value,
        hop=status.hop.value,
        survives_harvest=status.survives_harvest,
        stored_keys=status.stored_keys,
        key_rate=status.key_rate,
        qber=status.qber,
        alarm=status.alarm,
        restarts=keeper.restarts + status.restarts,
        lasts=lasts(status.stored_keys, rekeys),
    )
