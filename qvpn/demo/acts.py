"""What the demo shows, step by step.  Each act takes the scene, measures, and says what must hold.

Numbers come from the daemons' and KMEs' own sockets and from numbered packets; an act compares them and keeps none
for another act, except the totals that go on top of the JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from qvpn.crypto.suites import SUITES
from qvpn.demo import measure
from qvpn.demo.lab import SITES
from qvpn.demo.measure import Load, Loss
from qvpn.demo.process import Process
from qvpn.demo.scene import HARD_END, INNER_NETWORKS, REKEY, STRICT, TOLERANT, Scene
from qvpn.demo.sites import PORT
from qvpn.demo.steps import Facts, StepFailed, require, wait_for

FIRST_KEYS = 20
FIRST_KEYS_WITHIN = 30.0
BULK_BYTES = 64_000_000
LOAD_RATE = 1200.0
"""Numbered packets a second in each direction."""
REKEYS = 4
OUTER = "wan"


class Acts:
    """The acts, in the order of the methods.  ``totals`` collects the figures of the JSON's top level."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._captures: dict[str, Process] = {}
        self._tun_capture: Process | None = None
        self._beside: Load | None = None
        self.totals: dict[str, Any] = dict.fromkeys(
            ("rekeys", "packets_sent", "packets_lost", "bits_per_second", "keys_used", "origin")
        )

    def all(self) -> list[tuple[str, str, Callable[[Facts], None], bool]]:
        """Name, title, body, and whether the later steps stand on it."""
        return [
            ("keys_arrive", "QKD keys arrive at both KMEs", self.keys_arrive, True),
            ("handshake", "Handshake: hybrid post-quantum, with a QKD key", self.handshake, True),
            ("traffic", "Ping and a bulk transfer through the tunnel", self.traffic, False),
            ("rekey_under_load", f"{REKEYS} rekeys under load without a lost packet", self.rekeys_under_load, False),
            ("capture", "A capture of the outer link finds no plaintext", self.capture, False),
            ("wrong_key", "One KME flips a byte of every key: require-qkd gets no epoch", self.wrong_key, False),
            ("kme_off", "A KME is off: require-qkd stops at the hard end, nothing leaves", self.kme_off, False),
            ("prefer_passes", "Meanwhile prefer-qkd passes traffic on and says pqc", self.prefer_passes, False),
            ("kme_back", "The KME is back: the tunnel heals by itself", self.kme_back, False),
            ("eve_on", "Eve listens on the fibre: the link aborts, keys stop", self.eve_on, False),
            ("eve_off", "Eve is gone: keys come back", self.eve_off, False),
        ]

    # the ground

    def keys_arrive(self, facts: Facts) -> None:
        scene = self._scene
        scene.prepare()
        scene.start_keys()
        scene.prepare_second_pair()  # keys are on their way meanwhile
        self._start_captures()
        start = time.monotonic()
        self._wait_keys(1)
        scene.start_daemons()
        self._wait_keys(FIRST_KEYS)
        facts["seconds_waited"] = round(time.monotonic() - start, 1)
        stored = scene.stored_keys
        for site in SITES:
            facts[f"keys_at_{site}"] = stored(site)
        facts |= scene.link_facts()

    def _wait_keys(self, count: int) -> None:
        def enough() -> bool:
            self._scene.check_running()
            return min(self._scene.stored_keys(site) for site in SITES) >= count

        wait_for(f"{count} keys at each KME", enough, within=FIRST_KEYS_WITHIN)

    def handshake(self, facts: Facts) -> None:
        strict = self._scene.pairs[STRICT]
        for site in SITES:
            strict[site].wait_state("qkd", within=15)
        wait_for("the same epoch at both ends", lambda: self._same_epoch(STRICT), within=REKEY)
        views = {site: strict[site].peer() for site in SITES}
        epoch = views["alice"]["epoch"]
        facts["policy"] = views["alice"]["policy"]
        facts["epoch"] = epoch["number"]
        facts["suite"], facts["datagrams"] = self._handshake_on_the_wire()
        facts["initiator"] = next(site for site in SITES if views[site]["epoch"]["role"] == "initiator")
        facts["handshake_seconds"] = views["alice"]["handshake_seconds"]
        facts["key_id_hash_at_both_ends"] = epoch["key_id_hash"]
        facts["origin"] = epoch["origin"]
        facts["label"] = epoch["simulated"]
        self.totals["origin"] = epoch["origin"]
        require(epoch["origin"] == "simulated", f"the origin is {epoch['origin']}, and the link is simulated")
        require(bool(epoch["simulated"]), "the epoch rests on simulated keys and its status does not say so")

    def _handshake_on_the_wire(self) -> tuple[str, dict[str, int]]:
        """The suite that the first handshake named on the outer link, and its datagrams by message."""
        capture = self._captures["alice"]
        if self._scene.transport == "quic":
            wait_for("QUIC in the capture", lambda: capture.lines()[-1]["quic_packets"] > 0, within=3)
            seen = capture.lines()[-1]
            require(not seen["handshake_datagrams"], "handshake datagrams outside QUIC on the outer link")
            return "hidden in QUIC", {"QUIC": seen["quic_packets"]}
        wait_for("a handshake in the capture", lambda: "M4" in _datagrams(capture), within=3)
        suites = capture.lines()[-1]["suites"]
        require(len(suites) == 1, f"suites {suites} on the outer link, expected one")
        return SUITES[suites[0]].name, _datagrams(capture)

    def _same_epoch(self, pair: str) -> bool:
        hashes = [(daemon.peer()["epoch"] or {}).get("key_id_hash") for daemon in self._scene.pairs[pair].values()]
        return hashes[0] is not None and hashes[0] == hashes[1]

    # traffic

    def traffic(self, facts: Facts) -> None:
        scene = self._scene
        self._tun_capture = measure.start_capture(
            scene.lab, "alice", scene.interface(STRICT), scene.marker, inner=INNER_NETWORKS, name="capture-tun"
        )
        for family, inner in scene.inner(STRICT).items():
            result = measure.ping(scene.lab, "alice", inner["bob"], count=5)
            facts[f"ping_{family}"] = f"{result['received']} of {result['sent']} answered, {result['mean_ms']} ms"
            require(result["received"] == result["sent"], f"ping over {family}: {facts[f'ping_{family}']}")
        inner4 = scene.inner(STRICT)["ipv4"]
        done = measure.transfer(scene.lab, "alice", "bob", inner4["bob"], scene.marker, total=BULK_BYTES)
        facts["bulk_bytes"] = done.bytes
        facts["bulk_bits_per_second"] = done.bits_per_second
        facts["sha256_same_at_both_ends"] = done.same_hash
        self.totals["bits_per_second"] = done.bits_per_second
        require(done.same_hash, "the bytes that arrived are not the bytes that were sent")

    def _start_captures(self) -> None:
        scene = self._scene
        for site in SITES:
            self._captures[site] = measure.start_capture(
                scene.lab, site, OUTER, scene.marker, inner=INNER_NETWORKS, port=PORT
            )

    def rekeys_under_load(self, facts: Facts) -> None:
        strict = self._scene.pairs[STRICT]
        load = self._load(STRICT)
        before = {site: strict[site].peer()["rekeys"] for site in SITES}
        load.begin()
        start = time.monotonic()
        for site in SITES:
            strict[site].wait_epochs(before[site] + 1 + REKEYS, within=REKEYS * REKEY + 15)
        took = time.monotonic() - start
        loss = load.finish()
        rekeys = min(strict[site].peer()["rekeys"] - before[site] for site in SITES)
        self.totals |= {"rekeys": rekeys, "packets_sent": loss.sent, "packets_lost": loss.lost}
        facts |= {
            "rekeys": rekeys,
            "seconds_for_the_rekeys": round(took, 1),
            "packets_sent": loss.sent,
            "packets_received": loss.received,
            "duplicates": loss.duplicates,
            "longest_gap_seconds": round(loss.longest_gap, 3),
        }
        if loss.lost:
            facts["drop_counters"] = {site: strict[site].peer()["drops"] for site in SITES}
        require(rekeys >= REKEYS, f"{rekeys} rekeys, expected at least {REKEYS}")
        require(loss.lost == 0 and loss.duplicates == 0, f"{loss.lost} packets lost, {loss.duplicates} twice")

    def _load(self, pair: str, rate: float = LOAD_RATE) -> Load:
        scene = self._scene
        inner = scene.inner(pair)["ipv4"]
        return Load(scene.lab, inner, scene.marker, rate=rate, linger=1.0, name=f"load-{pair}", report=0.25)

    def capture(self, facts: Facts) -> None:
        """Counts from before the first handshake on: that, pings, the bulk transfer and the load are all in them."""
        if self._tun_capture is None:
            raise StepFailed("nothing was captured on the TUN, for the step with the traffic failed before that")
        control = self._tun_capture.finish()
        facts["frames_on_the_tun"] = control["frames"]
        facts["with_plaintext_on_the_tun"] = control["frames_with_plaintext"]
        require(control["frames_with_plaintext"] > 0, "the control search did not find the pattern on the TUN")
        quic = self._scene.transport == "quic"
        carried = "quic_packets" if quic else "tunnel_records"
        for site, running in self._captures.items():
            seen = running.finish()
            facts[f"outer_frames_{site}"] = seen["frames"]
            facts[f"outer_bytes_{site}"] = seen["bytes"]
            facts[f"{carried}_{site}"] = seen[carried]
            facts[f"with_plaintext_{site}"] = seen["frames_with_plaintext"]
            facts[f"with_inner_address_{site}"] = seen["frames_with_inner_address"]
            require(seen[carried] > 0, f"nothing of the tunnel on the outer link of {site}")
            require(quic == (not seen["tunnel_records"]), "records of the tunnel outside QUIC")
            _require_clean(seen, site)

    # faults

    def wrong_key(self, facts: Facts) -> None:
        scene = self._scene
        strict = scene.pairs[STRICT]
        before = {site: strict[site].peer() for site in SITES}
        scene.set_fault("bob", "wrong-key")
        reasons: set[str] = set()
        took = self._wait_blocked(reasons)
        after = {site: strict[site].peer() for site in SITES}
        epochs = max(after[site]["epochs"] - before[site]["epochs"] for site in SITES)
        facts["seconds_to_the_hard_end"] = round(took, 1)
        facts["epochs_with_a_wrong_key"] = epochs
        facts["failed_handshakes"] = sum(after[site]["failures"] - before[site]["failures"] for site in SITES)
        facts["reasons"] = sorted(reasons)
        facts["state"] = {site: strict[site].state() for site in SITES}
        facts["prefer_qkd_meanwhile"] = {site: self._scene.pairs[TOLERANT][site].state() for site in SITES}
        # A handshake that had its key before the fault may still have ended.
        require(epochs <= 1, f"{epochs} epochs were made while one KME flipped a byte of every key")
        require(any("key_mismatch" in reason for reason in reasons), "no handshake failed for two keys that differ")
        scene.set_fault("bob", "none")
        facts["seconds_to_heal"] = round(self._wait_healed(STRICT), 1)

    def _wait_blocked(self, reasons: set[str] | None = None) -> float:
        """Wait until neither end lets packets out, and note why handshakes failed until then."""
        strict = self._scene.pairs[STRICT]
        known = {site: strict[site].peer()["failures"] for site in SITES}

        def blocked() -> bool:
            views = {site: strict[site].peer() for site in SITES}
            for site in SITES:
                if reasons is not None and views[site]["failures"] > known[site]:
                    reasons.add(views[site]["last_failure"])
            return all(view["state"] == "blocked" for view in views.values())

        return wait_for("both ends blocked", blocked, within=HARD_END + 6)

    def _wait_healed(self, pair: str) -> float:
        start = time.monotonic()
        for daemon in self._scene.pairs[pair].values():
            daemon.wait_state("qkd", within=25)
        return time.monotonic() - start

    def kme_off(self, facts: Facts) -> None:
        scene = self._scene
        strict = scene.pairs[STRICT]
        captures = {
            site: measure.start_capture(scene.lab, site, OUTER, scene.marker, inner=INNER_NETWORKS, port=PORT)
            for site in SITES
        }
        load, self._beside = self._load(STRICT, 250), self._load(TOLERANT, 250)
        load.begin()
        self._beside.begin()
        hard_end = self._hard_end()
        since = time.monotonic()
        scene.stop_kme("alice")
        self._wait_blocked()
        blocked, sent = time.monotonic(), self._sent_packets()
        time.sleep(1.0)  # the load goes on against the closed door
        require(self._sent_packets() == sent, "packets left after both ends were blocked")
        loss = load.finish()
        seen = {site: capture.finish() for site, capture in captures.items()}
        # Inside QUIC nobody sees a record; then the daemons' word must do, and that of their counters above.
        hidden = blocked if scene.transport == "quic" else since
        last = max(view["last_record_at"] or hidden for view in seen.values()) - since
        facts |= {
            "seconds_until_the_last_record": round(last, 1),
            "hard_end_seconds": hard_end,
            "packets_passed_before": loss.received,
            "packets_blocked": loss.lost,
            "state": {site: strict[site].state() for site in SITES},
            "frames_in_clear": sum(
                view["frames_with_plaintext"] + view["frames_with_inner_address"] for view in seen.values()
            ),
        }
        require(loss.lost > 0, "the load ended before anything was blocked")
        require(last <= HARD_END + 1, f"records left {last:.1f} s after the KME went, later than the hard end")
        for site, view in seen.items():
            _require_clean(view, site)

    def _hard_end(self) -> float:
        """Seconds from its beginning to its end, as the daemon says of its epoch."""
        epoch = self._scene.pairs[STRICT]["alice"].peer()["epoch"]
        return round(float(epoch["age"] + epoch["hard_end_in"]), 1)

    def _sent_packets(self) -> list[int]:
        return [int(daemon.peer()["sent_packets"]) for daemon in self._scene.pairs[STRICT].values()]

    def prefer_passes(self, facts: Facts) -> None:
        if self._beside is None:
            raise StepFailed("the prefer-qkd pair has no load, for the step before failed too early")
        tolerant = self._scene.pairs[TOLERANT]
        for site in SITES:
            tolerant[site].wait_state("pqc", within=10)
        views = {site: tolerant[site].peer() for site in SITES}
        before = _received(self._beside)
        wait_for("packets of the prefer-qkd pair", lambda: _received(self._beside) > before + 200, within=5)
        loss: Loss = self._beside.finish()
        strict = self._scene.pairs[STRICT]
        facts |= {
            "policy": views["alice"]["policy"],
            "state": {site: views[site]["state"] for site in SITES},
            "origin": views["alice"]["epoch"]["origin"],
            "packets_passed": loss.received,
            "longest_gap_seconds": round(loss.longest_gap, 3),
            "require_qkd_meanwhile": strict["alice"].state(),
        }
        require(loss.longest_gap < REKEY, f"traffic stood still for {loss.longest_gap:.1f} s")

    def kme_back(self, facts: Facts) -> None:
        scene = self._scene
        scene.start_kme("alice")
        facts["seconds_to_heal"] = round(self._wait_healed(STRICT), 1)
        result = measure.ping(scene.lab, "alice", scene.inner(STRICT)["ipv4"]["bob"], count=3)
        facts["ping"] = f"{result['received']} of {result['sent']} answered"
        require(result["received"] == result["sent"], f"after healing: {facts['ping']}")
        facts["prefer_qkd_back_on_keys_after"] = round(self._wait_healed(TOLERANT), 1)

    # the eavesdropper

    def eve_on(self, facts: Facts) -> None:
        scene = self._scene
        start = time.monotonic()
        scene.set_eve(on=True)
        wait_for("an alarm of the link", lambda: all(scene.link_alarm(site) for site in SITES), within=20)
        facts["seconds_to_the_alarm"] = round(time.monotonic() - start, 1)
        facts["alarm"] = scene.link_alarm("alice")
        before = scene.delivered_blocks()
        time.sleep(5.0)  # more than two blocks' time
        after = scene.delivered_blocks()
        facts["new_blocks_while_eve_listens"] = after - before
        facts["qber"] = scene.link_facts().get("qber")
        require(after == before, f"{after - before} blocks of keys were delivered while Eve listened")

    def eve_off(self, facts: Facts) -> None:
        scene = self._scene
        before = scene.delivered_blocks()
        scene.set_eve(on=False)
        took = wait_for("a new block of keys", lambda: scene.delivered_blocks() > before, within=20)
        facts["seconds_to_the_first_block"] = round(took, 1)
        wait_for("the end of the alarm", lambda: not any(scene.link_alarm(site) for site in SITES), within=5)
        for site in SITES:
            facts[f"keys_at_{site}"] = scene.stored_keys(site)
        strict = scene.pairs[STRICT]
        epochs = {site: strict[site].peer()["epochs"] for site in SITES}
        for site in SITES:
            strict[site].wait_epochs(epochs[site] + 1, within=REKEY + 8)
        facts["tunnel"] = strict["alice"].state()
        require(facts["tunnel"] == "qkd", f"the tunnel is in state {facts['tunnel']}")
        self.totals["keys_used"] = max(strict[site].peer()["keys_used"] for site in SITES)


def _datagrams(capture: Process) -> dict[str, int]:
    return dict(capture.lines()[-1].get("handshake_datagrams", {}))


def _received(load: Load | None) -> int:
    assert load is not None
    return sum(int(counts.get("received", 0)) for counts in load.counts().values())


def _require_clean(seen: dict[str, Any], site: str) -> None:
    require(seen["frames_with_plaintext"] == 0, f"{seen['frames_with_plaintext']} frames in clear leave {site}")
    require(
        seen["frames_with_inner_address"] == 0,
        f"{seen['frames_with_inner_address']} frames with an inner address leave {site}",
    )
    require(
        seen["unseen"] == 0 and seen["truncated"] == 0,
        f"the capture at {site} missed {seen['unseen']} frames and cut {seen['truncated']}",
    )
