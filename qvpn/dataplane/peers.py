"""Who the packet path knows: peers, their epochs by receive index, their prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qvpn.dataplane.stats import EpochStatus, PeerTraffic
from qvpn.netio.base import VNET_HEADER, Address, Bind
from qvpn.tunnel.allowedips import AllowedIPs, IPNetwork
from qvpn.tunnel.drops import DropReason, Drops
from qvpn.tunnel.epoch import Epoch, PeerEpochs
from qvpn.tunnel.keys import EpochKeys
from qvpn.tunnel.records import LIMITS, OVERHEAD, Limits, index_bytes

MAX_PAYLOAD = 0xFFFF
REPORT_INTERVAL = 1.0
"""Seconds between two reports of an unknown address of one peer."""


class Peer:
    """One peer, as the packet path sees it."""

    __slots__ = (
        "_reported_at",
        "drops",
        "endpoint",
        "epochs",
        "heard",
        "last_received",
        "last_sent",
        "max_plaintext",
        "name",
        "path_payload",
        "provisional",
        "received_bytes",
        "received_packets",
        "received_records",
        "sent_bytes",
        "sent_packets",
        "sent_records",
        "source_checks",
        "tun_refused",
        "tun_writes",
        "unsent_bytes",
        "unsent_records",
    )

    def __init__(self, name: str, overlap: float, limits: Limits) -> None:
        self.name = name
        self.epochs = PeerEpochs(overlap, limits)
        self.endpoint: Address | None = None
        self.max_plaintext = 0
        """Plaintext bytes that one record to the endpoint can carry."""
        self.path_payload = MAX_PAYLOAD
        """UDP payload that the path beyond the first link carries, as far as the search for it knows."""
        self.provisional = False
        """That search is not over."""
        self.drops = Drops()
        self.sent_bytes = self.sent_packets = self.sent_records = 0
        self.received_bytes = self.received_packets = self.received_records = 0
        self.unsent_bytes = self.unsent_records = 0
        """Of these, what a transport took and then dropped; inner bytes."""
        self.source_checks = self.tun_writes = self.tun_refused = 0
        self.last_received: float | None = None
        self.last_sent: float | None = None
        self._reported_at = float("-inf")
        self.heard: Address | None = None
        """The endpoint as the bind gives it: the same object is quicker to tell than an equal one."""

    def __str__(self) -> str:
        return self.name

    def sending(self, now: float) -> Epoch | None:
        return self.epochs.sending(now)

    def set_endpoint(self, address: Address | None) -> None:
        self.endpoint = address
        self.heard = None

    def measure_path(self, bind: Bind) -> None:
        """Ask again how much one datagram to the endpoint can carry."""
        if self.endpoint is not None:
            self.max_plaintext = min(bind.max_payload(self.endpoint), self.path_payload) - OVERHEAD

    @property
    def inner_mtu(self) -> int:
        """Bytes of the longest inner packet that one record carries."""
        return self.max_plaintext - VNET_HEADER

    def should_report(self, address: Address, now: float) -> bool:
        """True if control should hear of this address: not the endpoint, and none reported just now."""
        if address == self.endpoint:
            self.heard = address
            return False
        if now - self._reported_at < REPORT_INTERVAL:
            return False
        self._reported_at = now
        return True

    def count_sent(self, records: int, packets: int, plaintext: int, now: float) -> None:
        self.sent_records += records
        self.sent_packets += packets
        self.sent_bytes += plaintext - packets * VNET_HEADER
        self.last_sent = now

    def count_unsent(self, records: int, size: int) -> None:
        """Records of so many bytes in all were not sent after all; each counts as one packet."""
        self.unsent_records += records
        self.unsent_bytes += _inner(records, size)
        self.drops.count(DropReason.CARRIER_QUEUE, records)

    def traffic(self, now: float, waiting: tuple[int, int] = (0, 0)) -> PeerTraffic:
        """``waiting``: records that were given to a transport and still wait there, and their bytes."""
        unsent = self.unsent_records + waiting[0]
        return PeerTraffic(
            peer=self.name,
            endpoint=self.endpoint,
            sent_bytes=max(0, self.sent_bytes - self.unsent_bytes - _inner(*waiting)),
            sent_packets=max(0, self.sent_packets - unsent),
            sent_records=max(0, self.sent_records - unsent),
            received_bytes=self.received_bytes,
            received_packets=self.received_packets,
            received_records=self.received_records,
            opened=self.epochs.opened,
            marked=self.epochs.marked,
            source_checks=self.source_checks,
            tun_writes=self.tun_writes,
            tun_refused=self.tun_refused,
            drops=self.drops.nonzero(),
            last_received=self.last_received,
            last_sent=self.last_sent,
            epochs=tuple(self._status(epoch, now) for epoch in self.epochs),
        )

    def _status(self, epoch: Epoch, now: float) -> EpochStatus:
        return EpochStatus(
            number=epoch.number,
            receive_index=epoch.receive_index,
            send_index=epoch.send_index,
            state=epoch.state,
            role=self.epochs.role(epoch),
            initiator=epoch.initiator,
            confirmed=epoch.confirmed,
            held=epoch.held,
            age=now - epoch.installed,
            hard_end=epoch.hard_end,
            last_received=epoch.last_received,
            sealed=epoch.sealer.calls,
            opened=epoch.opener.calls,
            failed=epoch.opener.failed,
            marked=epoch.opener.marked,
        )


def _inner(records: int, size: int) -> int:
    """Bytes of the packets in so many records, which have so many bytes in all."""
    return max(0, size - records * (OVERHEAD + VNET_HEADER))


class PeerTable:
    """All peers.  ``by_index`` has every live epoch of all of them under its receive index as it is on the wire."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.by_index: dict[bytes, tuple[Peer, Epoch]] = {}
        self.allowed: AllowedIPs[Peer] = AllowedIPs()
        self.drops = Drops()
        """What cannot be charged to a peer."""
        self._by_name: dict[str, Peer] = {}
        self._limits = limits

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Peer:
        """Raises KeyError with a sentence."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"the packet path has no peer named {name}") from None

    def add(self, name: str, allowed_ips: Sequence[IPNetwork], overlap: float) -> Peer:
        """Raises ValueError if the name, or one of the prefixes, is taken."""
        if name in self._by_name:
            raise ValueError(f"the packet path already has a peer named {name}")
        peer = Peer(name, overlap, self._limits)
        self.allowed.add(peer, allowed_ips)
        self._by_name[name] = peer
        return peer

    def install(self, peer: Peer, keys: EpochKeys, now: float) -> None:
        """Raises ValueError if a live epoch of any peer has this receive index."""
        if index_bytes(keys.receive_index) in self.by_index:
            raise ValueError(f"receive index {keys.receive_index:#010x} is in use by a live epoch")
        epoch, evicted = peer.epochs.install(keys, now)
        self._forget(evicted)
        self.by_index[epoch.name] = (peer, epoch)

    def erase(self, peer: Peer, receive_index: int) -> None:
        epoch = peer.epochs.erase(receive_index)
        if epoch is not None:
            self._forget([epoch])

    def erase_all(self, peer: Peer) -> None:
        self._forget(peer.epochs.erase_all())

    def expire(self, peer: Peer, now: float) -> None:
        """Erase what is past its end."""
        self._forget(peer.epochs.expire(now))

    def next_end(self) -> float | None:
        """The earliest end of any live epoch."""
        return min((epoch.ends for _, epoch in self.by_index.values()), default=None)

    def sending(self, peer: Peer, now: float) -> Epoch | None:
        """The epoch to seal under, after erasing those that are over."""
        epoch = peer.epochs.sending(now)
        if epoch is None:
            self.expire(peer, now)
            epoch = peer.epochs.sending(now)
        return epoch

    def _forget(self, epochs: Sequence[Epoch]) -> None:
        for epoch in epochs:
            self.by_index.pop(epoch.name, None)
