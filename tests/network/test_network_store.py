"""What a node's store and its devices may do to it: a damaged row, a device that says another end than the map."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keysource.base import End, Origin, Owner
from keysource.device.messages import DeviceInfo
from keysource.errors import BadAnswer
from keysource.network import onetime
from keysource.network.feed import LinkFeed
from keysource.network.messages import Ack, Share
from keysource.network.store import NodeStore
from tests.network.hostile import Net, topology

CHAIN = [("a", "b"), ("b", "c")]


def test_a_damaged_row_does_not_keep_old_epochs_alive(tmp_path: Path) -> None:
    """There are eight slots for epochs' keys: a row that could not be wrapped anew would fill them in a day."""
    store = NodeStore(tmp_path / "node" / "relay.sqlite", "a", max_units=1000)
    store.bind_link("a-b", End.A, Owner.ALTERNATE)
    store.add_block("a-b", 0, bytearray(random.Random(1).randbytes(32 * 10)), Origin.QKD)
    store._db.execute("UPDATE unit SET material = zeroblob(60) WHERE key_id = (SELECT min(key_id) FROM unit)")
    for hour in range(20):
        store.begin_epoch(3600.0 * (hour + 1))
        while store.rewrap():
            pass
        assert len(store._epochs.alive) == 1
    assert len(store.damage) == 1
    store.close()


INFO = DeviceInfo("maker", "a-b", End.A, Owner.ALTERNATE, Origin.QKD, 0)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"end": End.B}, 'end "b"'),
        ({"owner": Owner.A}, 'owner "a"'),
        ({"owner": Owner.B}, 'owner "b"'),
        ({"hops": 1}, "trusted nodes"),
        ({"origin": Origin.SIMULATED}, "simulated"),
        ({"link": "b-c"}, "b-c"),
    ],
)
def test_a_device_that_is_not_what_the_map_says_is_refused(
    tmp_path: Path, said: dict[str, Any], problem: str
) -> None:
    """Two nodes that both took themselves for the owner would draw the same pads."""
    net = Net(tmp_path, topology(CHAIN, ("a", "c")), seed=2)
    feed = LinkFeed(net.nodes["a"].core, "a-b", tmp_path / "device.sock", lambda: None)
    feed._check(INFO)
    with pytest.raises(BadAnswer, match=problem):
        feed._check(replace(INFO, **said))
    net.close()


def test_a_hop_that_its_sender_sends_anew_erases_the_pads_that_it_names(tmp_path: Path) -> None:
    """A node that was started anew counts attempts from 1 again, under fresh pads."""
    net = Net(tmp_path, topology(CHAIN, ("a", "c")), seed=3)
    net.feed(100)
    net.run(2.0)
    first = next(share for share in net.masked.values() if share.header.hop == 0)
    drawn = net.stores["a"].draw("a-b", len(first.header.units))
    names = {"pad": tuple(name for name, _unit in drawn[:-1]), "mac": drawn[-1][0]}
    header = first.header.model_copy(update=names)
    again = Share(header=header, masked=first.masked, tag=onetime.tag(drawn[-1][1], header.encoded(), first.masked))
    before = net.stores["b"].link("a-b")
    net.nodes["b"].receive("a", again, net.now)
    after = net.stores["b"].link("a-b")
    assert before is not None
    assert after is not None
    assert before.peers - after.peers == len(header.units)
    answers = [message for _to, message in net.nodes["b"].take_outgoing() if isinstance(message, Ack)]
    assert [answer.status for answer in answers] == ["failed"]  # the same share, and another content
    net.close()
