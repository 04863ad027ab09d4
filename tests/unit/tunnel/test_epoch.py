"""Which epoch seals and which open, through every kind of change-over."""

from __future__ import annotations

import pytest

from qvpn.tunnel.epoch import MAX_EPOCHS, Epoch, EpochRole, PeerEpochs
from tests.unit.dataplane.support import epoch_pair

OVERLAP = 10.0


def install(epochs: PeerEpochs, number: int, *, initiator: bool, now: float = 0.0, hard_end: float = 1000.0) -> Epoch:
    pair = epoch_pair(number, hard_end=hard_end)
    return epochs.install(pair[0] if initiator else pair[1], now)[0]


@pytest.fixture
def epochs() -> PeerEpochs:
    return PeerEpochs(OVERLAP)


def test_the_initiator_seals_at_once(epochs: PeerEpochs) -> None:
    epoch = install(epochs, 1, initiator=True)
    assert epochs.sending(0.0) is epoch


def test_the_responder_seals_after_the_first_record(epochs: PeerEpochs) -> None:
    epoch = install(epochs, 1, initiator=False)
    assert epochs.sending(0.0) is None
    assert epochs.received(epoch, 1.0)
    assert not epochs.received(epoch, 2.0)
    assert epochs.sending(2.0) is epoch


@pytest.mark.parametrize("initiator", [True, False])
def test_the_overlap_starts_with_the_first_record_received_not_with_the_install(
    epochs: PeerEpochs, initiator: bool
) -> None:
    old = install(epochs, 1, initiator=True)
    epochs.received(old, 0.0)
    new = install(epochs, 2, initiator=initiator, now=100.0)
    assert old.ends == 1000.0
    assert epochs.sending(100.0) is (new if initiator else old)
    epochs.received(new, 300.0)
    assert old.ends == 310.0
    assert epochs.sending(300.0) is new
    assert epochs.expire(309.9) == []
    assert epochs.expire(310.0) == [old]
    assert list(epochs) == [new]


def test_the_overlap_never_prolongs_a_life(epochs: PeerEpochs) -> None:
    old = install(epochs, 1, initiator=True, hard_end=105.0)
    new = install(epochs, 2, initiator=True, now=100.0)
    epochs.received(new, 100.0)
    assert old.ends == 105.0


def test_at_the_hard_end_nothing_seals(epochs: PeerEpochs) -> None:
    epoch = install(epochs, 1, initiator=True, hard_end=50.0)
    assert epochs.sending(49.999) is epoch
    assert epochs.sending(50.0) is None


def test_an_erased_epoch_has_no_keys(epochs: PeerEpochs) -> None:
    epoch = install(epochs, 1, initiator=True)
    assert epochs.erase(epoch.receive_index) is epoch
    assert epoch.erased
    assert not hasattr(epoch, "sealer")
    assert not hasattr(epoch, "opener")
    assert epochs.sending(0.0) is None
    assert epochs.erase(epoch.receive_index) is None


def test_erasing_the_new_one_falls_back_to_the_old_while_it_lives(epochs: PeerEpochs) -> None:
    old = install(epochs, 1, initiator=False)
    epochs.received(old, 0.0)
    unconfirmed = install(epochs, 2, initiator=False)
    new = install(epochs, 3, initiator=True)
    assert epochs.sending(0.0) is new
    epochs.erase(new.receive_index)
    assert epochs.sending(0.0) is old
    assert epochs.role(unconfirmed) is EpochRole.NEXT


def test_a_late_record_of_an_old_epoch_does_not_turn_back(epochs: PeerEpochs) -> None:
    old = install(epochs, 1, initiator=False)
    new = install(epochs, 2, initiator=False)
    epochs.received(new, 5.0)
    assert epochs.received(old, 6.0)
    assert epochs.sending(6.0) is new
    assert new.ends == 1000.0


def test_of_two_handshakes_at_once_the_held_one_only_opens(epochs: PeerEpochs) -> None:
    before = install(epochs, 1, initiator=False)
    epochs.received(before, 0.0)
    winner = install(epochs, 2, initiator=False)
    loser = install(epochs, 3, initiator=True)
    assert epochs.hold(loser.receive_index, 20.0) is loser
    assert loser.ends == 30.0
    assert epochs.sending(20.0) is before
    assert epochs.received(loser, 21.0)
    assert epochs.sending(21.0) is before
    assert epochs.received(winner, 22.0)
    assert epochs.sending(22.0) is winner
    assert epochs.role(loser) is EpochRole.PREVIOUS
    assert epochs.hold(0x50, 0.0) is None


def test_too_many_push_out_the_oldest_that_does_not_seal(epochs: PeerEpochs) -> None:
    current = install(epochs, 1, initiator=True)
    made = [install(epochs, number, initiator=False) for number in range(2, MAX_EPOCHS + 1)]
    _, evicted = epochs.install(epoch_pair(99)[1], 0.0)
    assert evicted == [made[0]]
    assert made[0].erased
    assert epochs.sending(0.0) is current
    assert len(epochs) == MAX_EPOCHS


def test_an_index_in_use_is_refused(epochs: PeerEpochs) -> None:
    install(epochs, 1, initiator=True)
    with pytest.raises(ValueError, match="in use"):
        install(epochs, 1, initiator=True)


def test_erase_all(epochs: PeerEpochs) -> None:
    made = [install(epochs, number, initiator=True) for number in (1, 2)]
    assert epochs.erase_all() == made
    assert all(epoch.erased for epoch in made)
    assert len(epochs) == 0
    assert epochs.sending(0.0) is None
