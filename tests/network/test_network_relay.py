"""The relay's logic on a hostile network: pads used once, blocks at both ends or at none, altered shares caught."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from keysource.base import Origin
from keysource.network import crashes, onetime, shares
from keysource.network.core import Fault
from keysource.network.messages import Ack, Commit, Open, Proof, Verdict
from tests.network.hostile import Net, Weather, topology

LONG = bool(os.environ.get("QVPN_TEST_LONG"))
CHAIN = [("a", "b"), ("b", "c")]
DIAMOND = [("a", "b"), ("b", "e"), ("a", "c"), ("c", "e"), ("c", "d"), ("d", "e"), ("a", "d")]


@pytest.fixture
def nets(tmp_path: Path) -> Iterator[list[Net]]:
    made: list[Net] = []
    yield made
    for net in made:
        net.close()


def settle(net: Net) -> None:
    """The network heals; whatever was prepared is decided."""
    net.weather = Weather()
    net.down.clear()
    net.run(90.0)


def equal_ends(net: Net, ends: tuple[str, str]) -> dict[int, bytes]:
    left, right = (net.keys(end) for end in ends)
    assert left == right, "a block is at one end only, or differs"
    assert not any(net.nodes[ends[0]].initiators[name].state == "committing" for name in ["long"])
    return left


def test_a_block_goes_over_a_trusted_node_and_says_so(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=1))
    net.feed(200)
    net.run(5.0)
    keys = equal_ends(net, ("a", "c"))
    assert keys and all(len(block) == 4 * 32 for block in keys.values())
    for block in net.stores["c"].outbox("long"):
        assert (block.facts.origin, block.facts.hops, block.facts.paths) == (Origin.RELAYED, 1, (("a", "b", "c"),))
    cost = onetime.units_for(shares.wrapped_bytes(4))
    for node, link in (("a", "a-b"), ("b", "b-c")):
        stored = net.stores[node].link(link)
        assert stored is not None and 100 - stored.own == cost * len(keys), "a hop costs what it says"
    for node, link in (("b", "a-b"), ("c", "b-c")):
        stored = net.stores[node].link(link)
        assert stored is not None and 100 - stored.peers == cost * len(keys), "a pad is still at the other end"
    assert not net.stores["b"].outbox("long")


def test_a_direct_path_has_no_hops(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology([("a", "b")], ("a", "b"), max_hops=0), seed=2))
    net.feed(60)
    net.run(3.0)
    assert equal_ends(net, ("a", "b"))
    assert {(b.facts.origin, b.facts.hops) for b in net.stores["a"].outbox("long")} == {(Origin.RELAYED, 0)}


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_a_hostile_network(seed: int, tmp_path: Path, nets: list[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather(loss=0.15, double=0.2, longest=1.2, kill=0.02)
    nets.append(net := Net(tmp_path, topology(DIAMOND, ("a", "e"), paths=2), seed, weather))
    with net.killing(monkeypatch):
        for _ in range(8 if LONG else 3):
            net.feed(100)
            net.run(25.0)
    net.feed(100)  # both ends of a link may have lost each other's pads; fresh ones are always good
    settle(net)
    keys = equal_ends(net, ("a", "e"))
    assert keys and net.kills, "nothing happened"
    flat = [block[i : i + 32] for block in keys.values() for i in range(0, len(block), 32)]
    assert len(set(flat)) == len(flat), "a key came twice"


REAL = ("block.in-transaction", "block.stored", "share.sent", "delivered.stored", "migrate.in-transaction")
"""Only real processes come to these."""
POINTS = [point for point in crashes.POINTS if point not in REAL]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(
    point: str, tmp_path: Path, nets: list[Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times in a row, whoever comes to it; afterwards the ends are equal and go on."""
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=7))
    net.feed(140)
    with net.killing(monkeypatch, point, times=3):
        net.run(60.0)
        assert net.kills[point] == 3
    before = len(net.keys("a"))
    net.feed(60)
    settle(net)
    assert len(equal_ends(net, ("a", "c"))) > before


def test_a_lost_verdict_and_a_late_open_never_split_a_block(tmp_path: Path, nets: list[Net]) -> None:
    """The Open of a committed block comes again while the initiator still waits for the verdict."""
    nets.append(net := Net(tmp_path, topology([("a", "b")], ("a", "b")), seed=3))
    net.feed(60)
    for _ in range(400):
        net.run(0.01)
        if net.keys("b"):
            break
    target = net.nodes["b"]
    last = net.stores["b"].last("long")[1]
    message = Open(transfer=last, connection="long", block=0, count=4, paths=(("a", "b"),), origin="qkd")
    target.receive("a", message, net.now)
    assert not [m for _to, m in target.take_outgoing() if isinstance(m, Verdict) and not m.committed]
    settle(net)
    equal_ends(net, ("a", "b"))


def test_a_message_that_comes_twice_costs_one_pad(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=14, weather=Weather(double=1.0)))
    net.feed(100)
    net.run(4.0)
    assert {share.header.attempt for share in net.masked.values()} == {1}
    assert len(equal_ends(net, ("a", "c"))) > 2


def test_an_old_message_under_a_used_pad_is_not_believed(tmp_path: Path, nets: list[Net]) -> None:
    """The same bytes again, after the node was started anew: it has forgotten the share, and has not the pad."""
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=15))
    net.feed(60)
    net.run(3.0)
    net.reboot("b")
    for share in {share.tag: share for share in net.masked.values() if share.header.hop == 0}.values():
        net.nodes["b"].receive("a", share, net.now)
    assert {message.status for _to, message in net.nodes["b"].take_outgoing() if isinstance(message, Ack)} == {
        "key not present"
    }


def test_a_store_from_a_backup_stops_its_links(tmp_path: Path, nets: list[Net]) -> None:
    """The other end has seen units used that are free again: not one of them goes out."""
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=18))
    net.feed(60)
    net.stores["b"].close()
    shutil.copytree(tmp_path / "b", tmp_path / "backup")
    net._boot("b")
    net.run(2.0)
    net.nodes["a"].initiators["long"]._room = lambda: 0
    net.run(5.0)
    known = len(equal_ends(net, ("a", "c")))
    assert known
    net.stores["b"].close()
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "backup", tmp_path / "b")
    net._boot("b")
    net.nodes["a"].initiators["long"]._room = lambda: 99
    net.feed(60)
    net.run(15.0)  # Net notes each unit that goes out, and fails where one comes again
    assert len(net.keys("a")) == known
    assert {event.facts["link"] for event in net.told("behind")} == {"b-c"}
    assert "no path" in net.nodes["a"].initiators["long"].trouble


def test_a_retry_takes_another_pad_and_the_next_node_pays_for_it_once(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=4))
    net.feed(200)
    net.run(1.0)  # stocks are known
    net.weather = Weather(loss=0.4)
    net.run(30.0)
    attempts = {share.header.attempt for share in net.masked.values()}
    assert max(attempts) > 1, "nothing was sent twice"
    settle(net)
    equal_ends(net, ("a", "c"))
    left = net.stores["b"].link("a-b")
    assert left is not None and left.peers >= 0


def test_an_altered_share_is_caught_and_that_way_left_alone(tmp_path: Path, nets: list[Net]) -> None:
    net = Net(tmp_path, topology(DIAMOND, ("a", "e"), paths=2), seed=5)
    nets.append(net)
    copied: list[bytes] = []
    net.nodes["b"].core.fault = Fault(copied=lambda _header, share: copied.append(share), alter=True)
    net.feed(160)
    net.run(8.0)
    keys = equal_ends(net, ("a", "e"))
    assert copied and net.told("altered"), "the corrupt node was never on the way"
    assert keys, "no other way was taken"
    for block in net.stores["e"].outbox("long"):
        assert all("b" not in path for path in block.facts.paths)
    for share in copied:  # it read what passed, and none of it is in any key
        assert not any(share[i : i + 16] in whole for whole in keys.values() for i in range(0, len(share) - 16, 16))


def test_a_node_that_swallows_shares_is_found_out(tmp_path: Path, nets: list[Net]) -> None:
    net = Net(tmp_path, topology(DIAMOND, ("a", "e"), paths=2), seed=6)
    nets.append(net)
    net.nodes["b"].core.fault = Fault(swallow=True)
    net.feed(160)
    net.run(25.0)
    assert equal_ends(net, ("a", "e"))
    assert any("did not arrive" in event.facts["reason"] for event in net.told("given up"))


def test_a_dead_node_and_an_alarmed_link_are_gone_round(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(DIAMOND, ("a", "e")), seed=8))
    net.feed(160)
    net.run(2.0)
    first = net.nodes["a"].initiators["long"].paths
    net.down.add(first[0][1])
    net.run(15.0)
    second = net.nodes["a"].initiators["long"].paths
    assert first[0][1] not in second[0] and net.nodes["a"].initiators["long"].state != "committing"
    net.feed(100)
    net.alarm(f"{second[0][0]}-{second[0][1]}", "qber: 25 %")
    before = len(net.keys("a"))
    net.run(10.0)
    third = net.nodes["a"].initiators["long"].paths
    assert third != second and len(net.keys("a")) > before
    for link in net.map.link:
        net.alarm(link.name, "qber: 25 %")
    net.run(10.0)
    before = len(net.keys("a"))
    net.run(10.0)
    assert len(net.keys("a")) == before and "no path" in net.nodes["a"].initiators["long"].trouble


def test_the_stock_of_a_cut_link_is_used_last(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(DIAMOND, ("a", "e")), seed=9))
    net.feed(60, "a-b", "b-e")
    net.feed(40)
    net.nodes["b"].core.links["b-e"].up = net.nodes["e"].core.links["b-e"].up = False
    net.run(30.0)
    ways = [block.facts.paths[0][1] for block in net.stores["a"].outbox("long")]
    assert "b" in ways and ways.index("b") == len(ways) - ways[::-1].index("b") - ways.count("b")
    assert set(ways[: ways.index("b")]) <= {"c", "d"} and ways[0] != "b"


def caught(net: Net, until: str) -> None:
    for _ in range(600):
        net.run(0.005)
        if net.nodes["a"].initiators["long"].state == until:
            return
    raise AssertionError(f"never {until}")


def test_a_forged_confirmation_commits_nothing(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=16))
    net.feed(60)
    caught(net, "relaying")
    transfer = next(iter(net.masked.values())).header.transfer
    net.nodes["a"].receive("c", Proof(transfer=transfer, tag=bytes(32)), net.now)
    assert net.stores["a"].prepared("long") is None
    assert any(event.kind == "unconfirmed" for event in net.nodes["a"].take_events())
    caught(net, "committing")
    block = net.stores["a"].prepared("long")
    assert block is not None and not net.keys("c")
    net.nodes["c"].receive("a", Commit(transfer=block.transfer, connection="long", tag=bytes(32)), net.now)
    assert not net.keys("c")
    settle(net)
    assert block.block not in equal_ends(net, ("a", "c")), "a refused block came back"


def test_a_forged_hop_is_refused_and_its_pad_gone(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=17))
    net.feed(60)
    caught(net, "relaying")
    share = next(share for share in net.masked.values() if share.header.hop == 0)
    bent = share.model_copy(update={"header": share.header.model_copy(update={"block": share.header.block + 1})})
    for message, expected in ((bent, "failed"), (share, "key not present")):
        net.nodes["b"].receive("a", message, net.now)
        answers = [answer for _to, answer in net.nodes["b"].take_outgoing()]
        assert [answer.status for answer in answers if isinstance(answer, Ack)] == [expected]
        assert len(answers) == 1, "something was passed on"
        stored = net.stores["b"].link("a-b")
        assert stored is not None and stored.peers == 30 - len(share.header.units)


def test_two_maps_that_differ_make_no_key(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=10))
    other = net.map.model_copy(
        update={"link": [link.model_copy(update={"origin": Origin.SIMULATED}) for link in net.map.link]}
    )
    net.nodes["c"].core.topology = other
    net.feed(200)
    net.run(10.0)
    assert not net.keys("a") and not net.keys("c")
    assert "maps differ" in net.nodes["a"].initiators["long"].trouble


def test_nobody_takes_the_keys(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(CHAIN, ("a", "c")), seed=11))
    net.nodes["a"].initiators["long"]._room = lambda: 3
    net.feed(200)
    net.run(2.5)
    assert {len(block) for block in net.keys("a").values()} == {96}
    net.nodes["a"].initiators["long"]._room = lambda: 0
    net.run(1.0)
    before = len(net.keys("a"))
    net.run(5.0)
    assert len(net.keys("a")) == before


def test_a_corrupt_node_off_the_way_cannot_bring_a_block_down(tmp_path: Path, nets: list[Net]) -> None:
    """It knows transfer and connection, has a link to the target, and sends junk under another path's name."""
    nets.append(net := Net(tmp_path, topology(DIAMOND, ("a", "e"), paths=2), seed=12))
    net.feed(160)
    net.run(0.8)
    for _ in range(200):
        net.run(0.01)
        inner = {node for path in net.nodes["a"].initiators["long"].paths for node in path[1:-1]}
        for transfer in {share.header.transfer for share in net.masked.values()} - set(net.junk):
            for corrupt in {"b", "c", "d"} - inner:
                for index in (0, 1):
                    net.send_junk(corrupt, "e", ("a", corrupt, "e"), transfer, index)
    settle(net)
    assert len(equal_ends(net, ("a", "e"))) > 3
    assert len(set(net.junk)) > 3 and not net.told("altered") and not net.told("given up")


def test_who_fails_may_blame_only_what_lies_behind_it(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology(DIAMOND, ("a", "e")), seed=13))
    net.feed(60)
    for _ in range(300):
        net.run(0.005)
        if net.nodes["a"].initiators["long"].state == "relaying":
            break
    first = net.nodes["a"].initiators["long"].paths[0]
    share = next(share for share in net.masked.values() if share.header.hop == 0)
    others = {("a", node) for node in "bcd"} - {first[:2]}
    for at in others:
        ack = Ack(transfer=share.header.transfer, index=0, attempt=1, status="failed", message="no", at=at)
        net.nodes["a"].receive(first[1], ack, net.now)
    capacity = net.nodes["a"].stocks.capacity(net.now, only_up=True)
    assert first[:2] not in capacity and others & set(capacity) == others


def finished(net: Net) -> int:
    """Blocks that both ends have, once none is on its way."""
    initiator = net.nodes["a"].initiators["long"]
    room, initiator._room = initiator._room, lambda: 0
    net.run(20.0)
    initiator._room = room
    return len(equal_ends(net, ("a", "c")))


def used(net: Net, since: float) -> set[str]:
    """Links of the first hop, since then."""
    return {link for at, link in net.hops if at > since and link.startswith("a-b")}


def test_two_fibres_between_two_nodes(tmp_path: Path, nets: list[Net]) -> None:
    """Key is drawn from any that lives; an alarm on one stops its keys only."""
    nets.append(net := Net(tmp_path, topology([("a", "b"), ("a", "b"), ("b", "c")], ("a", "c")), seed=22))
    assert [link.name for link in net.map.link] == ["a-b", "a-b-1", "b-c"]
    net.feed(60, "a-b-1", "b-c")
    net.run(3.0)
    assert finished(net) > 2 and used(net, 0.0) == {"a-b-1"}
    net.feed(100)
    for alarmed, other in (("a-b", "a-b-1"), ("a-b-1", "a-b")):
        net.alarm(alarmed, "qber: 25 %")
        before, known, now = len(net.keys("a")), net.stores["a"].link(alarmed), net.now
        net.feed(60, other, "b-c")
        net.run(3.0)
        assert finished(net) > before and used(net, now) == {other}
        assert net.stores["a"].link(alarmed) == known, "key of an alarmed link was used"
        net.alarm(alarmed, "")
    for name in ("a-b", "a-b-1"):
        net.alarm(name, "qber: 25 %")
    net.run(1.0)
    before = len(net.keys("a"))
    net.run(8.0)
    assert len(net.keys("a")) == before and "no path" in net.nodes["a"].initiators["long"].trouble


def test_a_cut_fibre_lives_on_its_stock_only_while_the_other_has_none(tmp_path: Path, nets: list[Net]) -> None:
    nets.append(net := Net(tmp_path, topology([("a", "b"), ("a", "b"), ("b", "c")], ("a", "c")), seed=23))
    net.feed(200, "a-b", "b-c")
    net.feed(60, "a-b-1")
    for node in ("a", "b"):
        net.nodes[node].core.links["a-b"].up = False
    net.run(10.0)
    order = [link for _at, link in net.hops if link.startswith("a-b")]
    first = order.index("a-b")
    assert set(order[:first]) == {"a-b-1"} and len(order[:first]) > 1
    assert finished(net) > 3


def test_a_key_is_worth_the_worse_of_two_fibres(tmp_path: Path) -> None:
    """The ends say its origin before they know which fibre a hop will take."""
    map_ = topology([("a", "b"), ("a", "b")], ("a", "b"))
    worse = [map_.link[0], map_.link[1].model_copy(update={"origin": Origin.SIMULATED})]
    assert map_.origin_over([("a", "b")]) is Origin.RELAYED
    assert map_.model_copy(update={"link": worse}).origin_over([("a", "b")]) is Origin.SIMULATED
