"""Two planes over the in-memory network: what passes, what does not, and under which name."""

from __future__ import annotations

import pytest

from qvpn.dataplane.plane import tunnel_mtu
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import EpochRole
from qvpn.tunnel.keys import Cipher
from qvpn.tunnel.records import Limits
from tests.unit.dataplane.support import ALICE, BOB, EVE, FROM_ALICE, FROM_BOB, Pair, epoch_pair, networks, numbered


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("cipher", list(Cipher))
def test_packets_pass_both_ways_unchanged_and_in_order(version: int, cipher: Cipher) -> None:
    pair = Pair()
    pair.established(cipher=cipher)
    pair.alice_sends(range(300), version, size=600)
    pair.bob_sends(range(1000, 1300), version)
    pair.run()
    expected = [numbered(n, FROM_ALICE[version], FROM_BOB[version], 600) for n in range(300)]
    assert pair.bob.tun.taken == expected
    assert pair.alice.taken_numbers() == list(range(1000, 1300))
    assert pair.drops() == {}


def test_traffic_is_counted() -> None:
    pair = Pair()
    pair.established()
    pair.alice_sends(range(10), size=80)
    pair.run()
    sent, received = pair.alice.plane.stats("bob"), pair.bob.plane.stats("alice")
    assert sent.sent_packets == received.received_packets == 10
    assert sent.sent_bytes == received.received_bytes == 10 * 100
    assert received.last_received == pytest.approx(pair.network.now, abs=1.0)
    assert received.epochs[0].marked == received.received_records == received.epochs[0].opened


def test_small_packets_share_records() -> None:
    pair = Pair()
    pair.established()
    before = pair.network.counts["sent"]
    pair.alice_sends(range(100), size=40)
    assert pair.network.counts["sent"] - before == -(-100 // (1440 // 70))
    pair.run()
    assert pair.bob.taken_numbers() == list(range(100))


def test_a_packet_of_exactly_the_tunnel_mtu_passes_and_one_byte_more_only_in_fragments() -> None:
    pair = Pair()
    pair.established()
    mtu = tunnel_mtu(pair.alice.bind.max_payload(BOB))
    assert mtu == 1430
    pair.alice_sends([1], size=mtu - 20)
    pair.alice_sends([2], size=mtu - 19)
    pair.run()
    assert [len(packet) for packet in pair.bob.tun.taken] == [10 + mtu, 10 + 20 + (mtu - 20) // 8 * 8, 10 + 20 + 3]
    assert not pair.alice.plane.stats("bob").drops


def test_without_an_epoch_nothing_leaves() -> None:
    pair = Pair()
    pair.alice_sends(range(7))
    pair.run()
    assert pair.network.counts["sent"] == 0
    assert pair.alice.plane.stats("bob").drops == {DropReason.NO_KEY: 7}
    assert not pair.alice.plane.send_control("bob", b"\x04")


def test_without_an_endpoint_nothing_leaves() -> None:
    pair = Pair()
    pair.established()
    pair.alice.plane.set_endpoint("bob", None)
    sent = pair.network.counts["sent"]
    pair.alice_sends([1])
    assert pair.alice.plane.stats("bob").drops == {DropReason.NO_ENDPOINT: 1}
    assert pair.network.counts["sent"] == sent


def test_the_responder_is_silent_until_the_first_record() -> None:
    pair = Pair()
    pair.install()
    pair.bob_sends([1])
    assert pair.bob.plane.stats("alice").drops == {DropReason.NO_KEY: 1}
    pair.alice_sends([2])
    pair.run()
    pair.bob_sends([3])
    pair.run()
    assert pair.bob.taken_numbers() == [2]
    assert pair.alice.taken_numbers() == [3]
    assert [peer for peer, _, _ in pair.bob.hooks.firsts] == ["alice"]


def test_at_the_hard_end_nothing_is_sealed_or_opened_even_without_a_timer() -> None:
    pair = Pair()
    pair.established(hard_end=100.0)
    pair.network.advance(99.0)
    pair.alice_sends([1])
    pair.network.now = 99.9
    pair.alice_sends([2])
    pair.network.advance(100.0)
    assert pair.bob.taken_numbers() == [1, 2]
    pair.alice_sends([3])
    assert pair.alice.plane.stats("bob").drops == {DropReason.NO_KEY: 1}
    assert pair.alice.plane.stats("bob").epochs == ()


def test_a_record_that_arrives_at_the_hard_end_is_expired() -> None:
    pair = Pair(impairments=Impairments(delay=1.0))
    pair.install(hard_end=100.0)
    pair.network.advance(99.5)
    pair.alice_sends([1])
    pair.network.advance(101.0)
    assert pair.bob.tun.taken == []
    assert pair.bob.plane.stats("alice").drops == {DropReason.EXPIRED: 1}


def test_tick_erases_what_is_over() -> None:
    pair = Pair()
    pair.established(hard_end=50.0)
    pair.network.advance(49.0)
    pair.bob.plane.tick()
    assert len(pair.bob.plane.stats("alice").epochs) == 1
    pair.network.advance(50.0)
    pair.bob.plane.tick()
    assert pair.bob.plane.stats("alice").epochs == ()


def test_wrong_inner_source_is_dropped_by_name() -> None:
    pair = Pair()
    pair.established()
    foreign = numbered(1, "10.90.0.77", FROM_BOB[4])
    pair.alice.tun.inject([foreign, *[numbered(2, FROM_ALICE[4], FROM_BOB[4])]])
    pair.run()
    assert pair.bob.taken_numbers() == [2]
    assert pair.bob.plane.stats("alice").drops == {DropReason.WRONG_SOURCE: 1}


def test_unknown_destination_is_dropped_by_name() -> None:
    pair = Pair()
    pair.established()
    pair.alice.tun.inject([numbered(1, FROM_ALICE[4], "198.51.100.1")])
    assert pair.alice.plane.drops.nonzero() == {DropReason.NO_ROUTE: 1}


def test_a_kernel_that_takes_nothing_is_counted() -> None:
    pair = Pair()
    pair.established()
    pair.bob.tun.room = 3
    pair.alice_sends(range(10))
    pair.run()
    assert pair.bob.taken_numbers() == [0, 1, 2]
    assert pair.bob.plane.stats("alice").drops == {DropReason.TUN_FULL: 7}
    assert pair.bob.plane.stats("alice").received_packets == 3


def test_handshake_datagrams_go_to_the_hook_and_others_do_not() -> None:
    pair = Pair()
    for kind in (0, 1, 6, 7, 0x0F, 0x11, 0xFF):
        pair.network.inject(EVE, BOB, bytes([kind]) + bytes(60))
    pair.run()
    assert [(datagram[0], address) for datagram, address in pair.bob.hooks.handshakes] == [(1, EVE), (6, EVE)]
    assert pair.bob.plane.drops.nonzero() == {DropReason.BAD_HEADER: 5}


def test_send_handshake_goes_out_as_it_is() -> None:
    pair = Pair()
    pair.alice.plane.send_handshake([b"\x01" + bytes(50), b"\x03" + bytes(20)], BOB)
    pair.run()
    assert pair.bob.hooks.handshakes == [(b"\x01" + bytes(50), ALICE), (b"\x03" + bytes(20), ALICE)]


def test_a_record_from_a_new_address_is_reported_and_moves_nothing() -> None:
    pair = Pair()
    pair.established()
    pair.alice.bind.rebind(EVE)
    pair.alice_sends([1])
    pair.run(0.1)
    pair.alice_sends([2])
    pair.run(0.1)
    assert [(peer, address) for peer, _, address in pair.bob.hooks.addresses] == [("alice", EVE)]
    assert pair.bob.plane.stats("alice").endpoint == ALICE
    pair.run(2.0)
    pair.alice_sends([3])
    pair.run(0.1)
    assert len(pair.bob.hooks.addresses) == 2
    pair.bob.plane.set_endpoint("alice", EVE)
    pair.bob_sends([9])
    pair.run()
    assert pair.alice.taken_numbers() == [9]
    assert pair.bob.taken_numbers() == [1, 2, 3]


def test_an_old_record_from_another_address_is_no_new_address() -> None:
    pair = Pair()
    pair.established()
    recorded: list[bytes] = []
    pair.network.tap = lambda _source, _destination, datagram: recorded.append(datagram)
    pair.network.block(ALICE, BOB)
    pair.alice_sends([1])
    pair.network.block(ALICE, BOB, False)
    pair.alice_sends([2])
    pair.run()
    pair.network.inject(EVE, BOB, recorded[0])
    pair.run()
    assert pair.bob.taken_numbers() == [2, 1]
    assert pair.bob.hooks.addresses == []


def test_control_can_go_under_a_given_epoch_and_to_a_given_address() -> None:
    pair = Pair()
    first, _ = pair.established(1)
    second, _ = pair.install(2)
    assert pair.alice.plane.send_control("bob", b"old", receive_index=first.receive_index)
    assert pair.alice.plane.send_control("bob", b"elsewhere", address=EVE)
    assert not pair.alice.plane.send_control("bob", b"none", receive_index=0x50)
    pair.run()
    assert pair.bob.hooks.controls[-1][2] == b"old"
    assert pair.network.counts["no_listener"] == 1
    assert pair.alice.plane.stats("bob").epochs[1].receive_index == second.receive_index


def test_the_limits_ask_for_a_rekey_once_and_then_stop() -> None:
    pair = Pair(limits=Limits(rekey=5, stop=8))
    initiator, responder = pair.install()
    for number in range(20):
        pair.alice_sends([number])
        pair.run()
    assert pair.bob.taken_numbers() == list(range(8))
    assert pair.alice.hooks.limits == [("bob", initiator.receive_index)]
    assert pair.bob.hooks.limits == [("alice", responder.receive_index)]
    assert pair.alice.plane.stats("bob").drops == {DropReason.LIMIT: 12}
    assert not pair.alice.plane.send_control("bob", b"\x04")


def forge(pair: Pair, receive_index: int, records: int) -> None:
    header = b"\x10\x01\0\0" + receive_index.to_bytes(4, "big")
    for counter in range(records):
        pair.network.inject(EVE, BOB, header + (1 << 20 | counter).to_bytes(8, "little") + bytes(40))
    pair.run()


def test_forged_records_ask_for_a_rekey_once_and_use_no_key_up() -> None:
    pair = Pair(limits=Limits(rekey=100, stop=100, failed_rekey=5, failed_stop=300))
    _, responder = pair.established()
    before = pair.bob.plane.stats("alice").epochs[0].opened
    forge(pair, responder.receive_index, 4)
    assert pair.bob.hooks.limits == []
    forge(pair, responder.receive_index, 150)
    assert pair.bob.hooks.limits == [("alice", responder.receive_index)]
    pair.alice_sends([7])
    pair.run()
    assert pair.bob.taken_numbers()[-1] == 7
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert (epoch.opened, epoch.failed) == (before + 1, 154)


def test_a_receiver_stops_after_very_many_forged_records() -> None:
    pair = Pair(limits=Limits(failed_rekey=2, failed_stop=4))
    _, responder = pair.established()
    forge(pair, responder.receive_index, 6)
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 4, DropReason.LIMIT: 2}
    taken = pair.bob.taken_numbers()
    pair.alice_sends([7])
    pair.run()
    assert pair.bob.taken_numbers() == taken


def test_the_newest_record_is_told_of_each_epoch() -> None:
    pair = Pair()
    pair.established(1)
    told = pair.bob.plane.stats("alice").epochs[0].last_received
    assert told is not None
    pair.install(2)
    pair.run(1.0)
    pair.bob_sends([5])  # the responder still sends on the first
    pair.run(0.5)
    first, second = pair.alice.plane.stats("bob").epochs
    assert second.last_received is None
    assert first.last_received == pytest.approx(pair.network.now, abs=0.6)
    assert first.last_received > told
    assert pair.alice.plane.stats("bob").last_received == first.last_received


def test_the_first_record_comes_with_its_address() -> None:
    pair = Pair()
    _, responder = pair.install()
    pair.alice.bind.rebind(EVE)
    pair.alice_sends([1])
    pair.run()
    assert pair.bob.hooks.firsts == [("alice", responder.receive_index, EVE)]


def test_reports_are_one_a_second_of_a_peer_not_of_an_address() -> None:
    pair = Pair()
    pair.established()
    elsewhere = [Address(EVE.ip, EVE.port + step) for step in range(1, 6)]
    for address in elsewhere:
        pair.alice.bind.rebind(address)
        pair.alice_sends([1])
        pair.run(0.1)
    assert [address for _, _, address in pair.bob.hooks.addresses] == elsewhere[:1]
    pair.run(1.0)
    pair.alice_sends([2])
    pair.run(0.1)
    assert [address for _, _, address in pair.bob.hooks.addresses] == [elsewhere[0], elsewhere[-1]]


def test_erase_all_closes_at_once() -> None:
    pair = Pair()
    pair.established()
    pair.bob.plane.erase_all("alice")
    pair.alice_sends([1])
    pair.bob_sends([2])
    pair.run()
    assert pair.bob.tun.taken == pair.alice.tun.taken == []
    assert pair.bob.plane.drops.nonzero() == {DropReason.UNKNOWN_INDEX: 1}
    assert pair.bob.plane.stats("alice").drops == {DropReason.NO_KEY: 1}


def test_roles_through_a_change_over() -> None:
    pair = Pair(overlap=5.0)
    pair.established(1)
    pair.install(2)
    roles = [epoch.role for epoch in pair.bob.plane.stats("alice").epochs]
    assert roles == [EpochRole.CURRENT, EpochRole.NEXT]
    roles = [epoch.role for epoch in pair.alice.plane.stats("bob").epochs]
    assert roles == [EpochRole.PREVIOUS, EpochRole.CURRENT]
    pair.alice_sends([1])
    pair.run()
    old, new = pair.bob.plane.stats("alice").epochs
    assert (old.role, new.role) == (EpochRole.PREVIOUS, EpochRole.CURRENT)
    pair.run(3.0)
    pair.bob.plane.tick()
    assert [epoch.number for epoch in pair.bob.plane.stats("alice").epochs] == [1, 2]
    pair.run(2.0)
    pair.bob.plane.tick()
    assert [epoch.number for epoch in pair.bob.plane.stats("alice").epochs] == [2]


def test_names_prefixes_and_indexes_are_taken_once() -> None:
    pair = Pair()
    keys, _ = pair.install()
    with pytest.raises(ValueError, match="already has a peer named bob"):
        pair.alice.plane.add_peer("bob", [], overlap=1.0)
    with pytest.raises(ValueError, match=r"10\.90\.0\.2/32 of peer carol already belong to peer bob"):
        pair.alice.plane.add_peer("carol", networks(FROM_BOB), overlap=1.0)
    pair.alice.plane.add_peer("carol", [], overlap=1.0)
    with pytest.raises(ValueError, match="in use"):
        pair.alice.plane.install("carol", keys)
    pair.alice_sends([1])
    pair.run()
    assert pair.bob.taken_numbers() == [1]


def test_close_erases_every_key() -> None:
    pair = Pair()
    pair.established()
    pair.alice.plane.close()
    pair.alice.plane.close()
    assert pair.alice.plane.stats("bob").epochs == ()
    pair.alice_sends([1])
    pair.bob_sends([2])
    pair.run()
    assert pair.alice.tun.taken == pair.bob.tun.taken == []


def test_too_many_unconfirmed_epochs_push_out_the_oldest_but_never_the_one_in_use() -> None:
    pair = Pair()
    pair.established(1)
    for number in range(2, 40):
        pair.bob.plane.install("alice", epoch_pair(number)[1])
    epochs = pair.bob.plane.stats("alice").epochs
    assert len(epochs) == 8
    assert epochs[0].number == 1
    assert [epoch.number for epoch in epochs[1:]] == list(range(33, 40))
    pair.bob_sends([5])
    pair.run()
    assert pair.alice.taken_numbers() == [5]
