"""Two daemons with everything but real sockets: what they do together, and what status says about it."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

import pytest

from keysource.base import Origin
from qvpn.control import endpoint as endpoint_module
from qvpn.netio.base import Address
from qvpn.status import SIMULATED

Play = Callable[..., None]


def test_two_daemons_agree_and_pass_packets(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        assert await world.up() < 1.0
        assert await world.send("alice", 20) == 20
        assert await world.send("bob", 20) == 20
        alice, bob = world.peer("alice"), world.peer("bob")
        assert alice["epoch"]["key_id_hash"] == bob["epoch"]["key_id_hash"]
        assert len(alice["epoch"]["key_id_hash"]) == 8
        assert {alice["epoch"]["role"], bob["epoch"]["role"]} == {"initiator", "responder"}
        assert alice["epoch"]["origin"] == bob["epoch"]["origin"] == "qkd"
        assert alice["epoch"]["hard_end_in"] == pytest.approx(30, abs=1)
        assert (alice["sent_packets"], alice["received_packets"]) == (20, 20)
        assert (alice["endpoint"], alice["policy"], alice["simulated"]) == ("192.0.2.2:51840", "require-qkd", None)
        assert alice["drops"].keys() <= {"handshake_cookie", "handshake_state"}

    play(story)


def test_packets_are_never_lost_by_a_rekey(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        came = sum([await world.send(site, 40) for _ in range(40) for site in ("alice", "bob")])
        assert came == world.sent == 3200
        for site in ("alice", "bob"):
            peer = world.peer(site)
            assert peer["rekeys"] >= 10
            assert peer["keys_used"] == peer["epochs"] == peer["rekeys"] + 1
            assert peer["failures"] == 0
        assert world.box.fetched == world.peer("alice")["keys_used"]
        assert world.box.drawn <= world.box.fetched + 1  # both started at once: one draw may be for nothing

    play(story, rekey="2s")


def test_status_has_its_schema(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        status = world.status("alice")
        assert status["schema"] == 1
        assert set(status) == {
            *("schema", "site", "pid", "version", "uptime", "fingerprint", "listen", "interface", "mtu", "peers"),
            *("key_sources", "drops", "send_errors", "lanes", "queues", "carriers"),
        }
        assert set(status["peers"][0]) == {
            *("name", "state", "policy", "fingerprint", "endpoint", "key_source", "epoch", "simulated"),
            *("last_handshake", "rekeys", "epochs", "keys_used", "handshake_seconds", "failures", "last_failure"),
            *("alarms", "last_alarm", "sent_packets", "sent_bytes", "received_packets", "received_bytes"),
            *("last_received", "drops", "opened", "marked", "source_checks", "tun_writes", "tun_refused", "lanes"),
            *("path", "carrier", "transports", "carrier_changes"),
        }
        assert set(status["peers"][0]["epoch"]) == {
            *("number", "state", "role", "age", "hard_end_in", "next_rekey_in", "origin", "key_id_hash", "simulated"),
        }
        source = status["key_sources"][0]
        assert (source["name"], source["type"], source["ready"], source["origin"]) == ("box", "spool", True, "qkd")

    play(story)


def test_a_simulated_key_is_called_so_everywhere(play: Play) -> None:
    async def story(world: Any) -> None:
        for site in ("alice", "bob"):
            world.make(site)
            world.sources[site].origin = Origin.SIMULATED
        await world.start()
        await world.up()
        peer = world.peer("alice")
        assert peer["simulated"] == peer["epoch"]["simulated"] == SIMULATED
        assert world.events("alice", "epoch confirmed")[0]["warning"] == SIMULATED

    play(story, more="allow_simulated = true")


def test_require_qkd_takes_no_simulated_key_unasked(play: Play) -> None:
    async def story(world: Any) -> None:
        for site in ("alice", "bob"):
            world.make(site)
            world.sources[site].origin = Origin.SIMULATED
        await world.start()
        await asyncio.sleep(60)
        assert world.state("alice") == world.state("bob") == "blocked"
        assert await world.send("alice", 5) == 0
        assert world.peer("alice")["drops"]["no_key"] == 5

    play(story)


def test_sources_gone_stop_require_qkd_at_the_hard_end_and_it_heals(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        for source in world.sources.values():
            source.down = True
        await asyncio.sleep(25)
        assert world.state("alice") == "qkd"
        await asyncio.sleep(10)
        assert world.state("alice") == world.state("bob") == "blocked"
        assert await world.send("alice", 5) == 0
        assert world.status("alice")["key_sources"][0]["reason"] == "down"
        for source in world.sources.values():
            source.down = False
        await world.up(within=20)
        assert await world.send("alice", 5) == 5

    play(story)


def test_prefer_qkd_goes_on_with_pqc_and_says_so(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        world.sources["bob"].down = True
        assert await world.send("alice", 6000) == 6000
        assert world.state("alice") == world.state("bob") == "pqc"
        assert world.peer("alice")["epoch"]["key_id_hash"] is None
        world.sources["bob"].down = False
        await world.up(within=20)

    play(story, more='policy = "prefer-qkd"')


def test_a_lying_source_makes_no_epoch_and_an_alarm(play: Play) -> None:
    async def story(world: Any) -> None:
        world.make("bob")
        world.sources["bob"].liar = True
        await world.start()
        await asyncio.sleep(20)
        assert world.state("alice") == world.state("bob") == "blocked"
        mismatches = [e for site in ("alice", "bob") for e in world.events(site, "alarm")]
        assert any("mismatch" in entry["kind"] for entry in mismatches)
        world.sources["bob"].liar = False
        await world.up(within=60)

    play(story)


def test_pqc_only_asks_no_source(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up("pqc")
        assert await world.send("alice", 5) == 5
        assert world.box.drawn == 0

    play(story, more='policy = "pqc-only"')


def test_an_orderly_stop_blocks_the_other_at_once_and_a_new_start_heals(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        await world.stop("alice")
        await asyncio.sleep(0.1)
        assert world.state("bob") == "blocked"
        await asyncio.sleep(30)
        await world.start("alice")
        assert await world.up(within=5) < 5
        assert await world.send("bob", 5) == 5

    play(story)


@pytest.mark.parametrize("victim", ["alice", "bob"])
def test_a_killed_daemon_comes_back_quickly(play: Play, victim: str) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        world.kill(victim)
        await asyncio.sleep(3)
        before = world.box.drawn
        await world.start(victim)
        await world.until(lambda: world.state(victim) == "qkd", 5)
        assert await world.send("alice", 5) == 5
        assert await world.send("bob", 5) == 5
        assert world.box.drawn - before <= 2

    play(story)


def test_a_site_without_an_endpoint_waits_and_learns(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start("bob")
        await asyncio.sleep(5)
        assert (world.state("bob"), world.peer("bob")["endpoint"]) == ("blocked", None)
        await world.start("alice")
        await world.up(within=5)
        assert await world.send("alice", 5) == 5
        assert await world.send("bob", 5) == 5
        assert world.peer("bob")["endpoint"] == "192.0.2.1:51840"

    play(story, endpoints=("alice",))


def test_roaming_follows_a_verified_record_and_a_probe(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        world.binds["alice"].rebind(Address(ipaddress.ip_address("203.0.113.9"), 4242))
        assert await world.send("alice", 1) == 1
        await asyncio.sleep(0.1)
        assert world.peer("bob")["endpoint"] == "203.0.113.9:4242"
        assert await world.send("bob", 5) == 5
        assert world.peer("alice")["epochs"] == 1

    play(story)


def test_a_record_replayed_from_elsewhere_moves_nothing(play: Play) -> None:
    """Whoever can forward packets of a peer from his own address, but not answer a probe, gets nothing."""

    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        stolen: list[bytes] = []
        alice, bob = world.binds["alice"].local, world.binds["bob"].local
        thief = Address(ipaddress.ip_address("198.51.100.66"), 1)
        world.network.tap = lambda source, _to, data: stolen.append(data) if source == alice else None
        world.network.block(alice, bob)
        assert await world.send("alice", 1) == 0
        world.network.tap = None
        world.network.inject(thief, bob, next(data for data in reversed(stolen) if data[0] == 0x10))
        await asyncio.sleep(1)
        assert world.peer("bob")["received_packets"] == 1
        assert len(world.events("bob", "peer seen at another address, probing")) == 1
        assert world.peer("bob")["endpoint"] == "192.0.2.1:51840"

    play(story)


def test_a_name_is_looked_up_until_it_is_known(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError(-2, "Name or service not known"), OSError(-2, "Name or service not known")]

    async def story(world: Any) -> None:
        loop = asyncio.get_running_loop()

        async def getaddrinfo(host: str, port: int, **_: Any) -> Any:
            if answers:
                raise answers.pop()
            return [(2, 2, 17, "", ("192.0.2.66", port)), (2, 2, 17, "", ("192.0.2.2", port))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        monkeypatch.setitem(world.__dict__, "endpoints", ())
        world.more = 'endpoint = "bob.example:51840"'
        world.make("alice")
        world.more = ""
        world.make("bob")
        await world.start()
        # the first address is nobody's: the next one has its turn
        await world.up(within=60)
        assert world.peer("alice")["endpoint"] == "192.0.2.2:51840"
        warnings = world.events("alice", "no address for the peer")
        assert [entry["reason"] for entry in warnings] == ["bob.example: name or service not known"]

    play(story)


def test_an_address_inside_the_tunnel_is_refused() -> None:
    from qvpn.config.units import parse_host_port, parse_network

    async def look() -> None:
        inside = [parse_network("10.20.0.0/16")]
        with pytest.raises(endpoint_module.NoAddress, match=r"10\.20\.1\.1, which lies inside a peer's allowed_ips"):
            await endpoint_module.resolve(parse_host_port("10.20.1.1:5"), forbidden=inside)
        with pytest.raises(endpoint_module.NoAddress, match="has no IPv4 address"):
            await endpoint_module.resolve(parse_host_port("[fd00::1]:5"), forbidden=inside, ipv6=False)
        found = await endpoint_module.resolve(parse_host_port("[::ffff:192.0.2.1]:5"), forbidden=inside)
        assert [str(address) for address in found] == ["192.0.2.1:5"]

    asyncio.run(look())


@pytest.mark.parametrize(("choice", "states"), [("finish-epoch", ["qkd"]), ("block-now", ["blocked"])])
def test_an_alarm_of_the_device_does_what_was_chosen(play: Play, choice: str, states: list[str]) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        for source in world.sources.values():
            source.alarm, source.down = "QBER 12%", True
        await asyncio.sleep(4)
        assert world.state("alice") in states
        assert world.peer("alice")["last_alarm"] == "key source: QBER 12%"
        assert world.peer("alice")["alarms"] == 1
        for source in world.sources.values():
            source.alarm, source.down = None, False
        await world.up(within=30)

    play(story, more=f'on_alarm = "{choice}"')


def test_an_alarm_can_bring_the_rekey_forward(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        before = world.peer("alice")["epochs"]
        world.sources["alice"].alarm = "monitor"
        await asyncio.sleep(3.5)
        assert world.peer("alice")["epochs"] == before + 1

    play(story, more='on_alarm = "rekey-now"')


def test_a_short_keepalive_is_kept(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        await asyncio.sleep(5.2)
        quiet = world.daemons["alice"]._plane.stats("bob")
        assert quiet.sent_packets == 0
        assert world.network.now - (quiet.last_sent or 0) <= 1.05

    play(story, rekey="60s", more='keepalive = "1s"')


def test_a_device_that_names_its_link_late_is_no_mismatch(play: Play) -> None:
    async def story(world: Any) -> None:
        world.make("bob")
        world.sources["bob"].named = False
        world.sources["bob"].down = True
        await world.start()
        await asyncio.sleep(5)
        world.sources["bob"].named = True
        world.sources["bob"].down = False
        await world.up(within=40)
        assert world.events("alice", "alarm") == world.events("bob", "alarm") == []

    play(story)


def test_nothing_secret_in_a_whole_life(play: Play) -> None:
    async def story(world: Any) -> None:
        seen: list[bytes] = []
        world.make("alice")
        give = world.sources["alice"].get_key

        async def noted(peer_sae: str) -> Any:
            key = await give(peer_sae)
            seen.append(bytes(key.material))
            return key

        world.sources["alice"].get_key = noted
        await world.start()
        await world.up()
        await asyncio.sleep(40)
        text = repr([world.logs, world.status("alice"), world.status("bob"), world.daemons])
        assert seen
        for secret in seen:
            for shown in (secret.hex(), repr(secret)[2:-1]):
                assert shown not in text

    play(story)


def test_a_mistake_in_control_is_contained_and_logged_without_its_text(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        agent = world.daemons["bob"].agents["alice"]

        def broken(*_: object) -> None:
            raise ValueError("key 5ec2e7")

        agent.control = broken
        await asyncio.sleep(12)  # keepalives and rekeys arrive and fail
        assert await world.send("alice", 5) == 5
        entry = world.events("bob", "internal error")[0]
        assert (entry["error"], entry["level"]) == ("ValueError", "error")
        assert entry["place"].startswith("test_daemon.py:")
        assert "5ec2e7" not in repr(world.logs)

    play(story)


def test_a_broken_follower_is_started_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: Any) -> None:
        world.make("alice")
        feed_broken = [True]

        async def ask(peer: Any) -> None:
            if feed_broken.pop() if feed_broken else False:
                raise KeyError("once")
            await original(peer)

        await world.start()
        await world.up()
        original = world.daemons["alice"]._ask_source
        monkeypatch.setattr(world.daemons["alice"], "_ask_source", ask)
        world.sources["alice"].alarm = "later"
        await asyncio.sleep(10)
        assert len(world.events("alice", "internal error")) == 1
        assert world.peer("alice")["last_alarm"] == "key source: later"

    play(story)


def test_a_timer_that_fails_is_set_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        agent = world.daemons["alice"].agents["bob"]
        failures = [None] * 3
        original = agent.machine.handle_timer

        def handle_timer(now: float) -> None:
            if failures:
                failures.pop()
                raise ZeroDivisionError
            original(now)

        monkeypatch.setattr(agent.machine, "handle_timer", handle_timer)
        epochs = world.peer("alice")["epochs"]
        await asyncio.sleep(30)
        assert len(world.events("alice", "internal error")) == 3
        assert world.peer("alice")["epochs"] > epochs

    play(story)
