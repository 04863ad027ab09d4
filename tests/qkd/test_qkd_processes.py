"""The link as it is run: three processes that share nothing but sockets, killed, tampered with, eavesdropped on."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qkd_lab import LinkLab, until

from keysource.base import Origin
from keysource.device.client import DeviceClient
from keysource.errors import KeySourceError
from keysource.qkd.distill.wire import Kind
from keysource.qkd.engine.control import ask

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
pytestmark = pytest.mark.timeout(900 if LONG else 180)


async def test_the_demo_delivers_twenty_equal_keys_in_its_first_block_and_ends_in_order(tmp_path: Path) -> None:
    async with LinkLab(tmp_path, pace="realtime") as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1, within=60)  # about 5 s on a free core; how fast it is, the demo shows
        (block,) = lab.common()
        assert len(lab.clients["alice"].blocks[block]) >= 20 * 32
        for site, end in (("alice", "a"), ("bob", "b")):
            device = await DeviceClient.connect(tmp_path / site / "device.sock")
            assert device.info.origin is Origin.SIMULATED and device.info.end == end
            await device.aclose()
        await lab.blocks(1, within=60)
        a, b = await lab.both()
        assert a["state"] == "up" and a["key_rate"] >= 1.0 and a["warning"].startswith("SIMULATED")
        assert a["ledger_balance"] == 0 == b["ledger_balance"]
        assert a["blocks_passed"] == b["blocks_passed"] >= 2 and a["ledger"] == b["ledger"]
        assert abs(a["qber"] - 0.005) < 0.004
        fibre = lab.fibre_pid()
        assert await lab.stop("bob") == 0 and await lab.stop("alice") == 0
        assert fibre is not None and not Path(f"/proc/{fibre}").exists()
        assert not (tmp_path / "alice" / "device.sock").exists()


async def test_processes_share_no_file_memory_or_seed(tmp_path: Path) -> None:
    """By their open descriptors, their memory maps, their environment and arguments."""
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        fibre = lab.fibre_pid()
        assert fibre is not None
        pids = {"alice": lab.pid("alice"), "bob": lab.pid("bob"), "fibre": fibre}
        secret = [(tmp_path / site / "auth.pad").read_bytes() for site in ("alice", "bob")]
        assert secret[0] == secret[1]
        assert (tmp_path / "alice/auth.pad").stat().st_ino != (tmp_path / "bob/auth.pad").stat().st_ino
        files: dict[str, set[str]] = {}
        for site, pid in pids.items():
            links = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
            files[site] = {link for link in links if str(tmp_path) in link and not link.endswith("/log")}
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            shared = [line for line in maps if line.split()[1] in ("rw-s", "-w-s", "rwxs")]
            assert not shared, shared
            outside = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            assert not any(part.hex().encode() in outside for part in (secret[0][:16], secret[0][64:80]))
            names = [name for name in ("alice", "bob") if f"/{name}/" in " ".join(files[site])]
            assert names in ([], [site])
        assert not files["alice"] & files["bob"] and not files["fibre"]
        assert "auth.pad" not in " ".join(files["fibre"])


async def test_eve_stops_the_keys_and_raises_the_alarm_and_leaving_lets_them_come_back(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        await lab.eve(1.0)
        alice, bob = lab.clients["alice"], lab.clients["bob"]
        await until(lambda: "qber" in alice.alarms and "qber" in bob.alarms, 20, lab.words)
        quiet = dict(alice.blocks), dict(bob.blocks)
        failed = (await lab.status("alice"))["blocks_failed"]
        await until_failed(lab, failed + 2)
        assert (alice.blocks, bob.blocks) == quiet, "a block came while Eve was there"
        for site in ("alice", "bob"):
            status = await lab.status(site)
            assert status["state"] == "aborted" and 0.23 < status["qber"] < 0.27 and "qber" in status["alarm"]
            assert status["ledger_balance"] == 0
        await lab.eve(0.0)
        await lab.blocks(1)
        assert not alice.alarms and not bob.alarms
        assert (await lab.status("bob"))["state"] == "up"


async def test_blinding_is_caught_by_the_monitor_alone_and_a_link_without_one_goes_on(tmp_path: Path) -> None:
    """Pulsed light passes the photocurrent monitor of the default configuration: keys go on, and Eve has them."""
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        socket = tmp_path / "alice" / "eve.sock"
        assert (await ask(socket, {"attack": "blinding", "mode": "pulsed"}))["attack"] == "blinding"
        await lab.blocks(2)
        assert not lab.clients["bob"].alarms, "nothing fires: the monitor is the wrong one"
        await ask(socket, {"attack": "blinding", "mode": "cw"})
        for site in ("alice", "bob"):
            await until(lambda site=site: "monitor" in lab.clients[site].alarms, 30, lab.words)  # type: ignore[misc]
        bob = await lab.status("bob")
        assert bob["monitor"] == "photocurrent" and bob["ledger_balance"] == 0
        await ask(socket, {"attack": "none"})
        await lab.blocks(1)
        assert not lab.clients["alice"].alarms and not lab.clients["bob"].alarms


async def test_a_used_up_error_budget_stops_the_link_also_after_a_restart(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        file = lab.file("alice")
        file.write_text(file.read_text() + "error_limit = 2.5e-9\n")
        await lab.start()
        lab.attach()
        await until(lambda: "error budget" in lab.words() or len(lab.common()) >= 2, 60, lab.words)
        for again in (False, True):
            if again:
                await lab.kill("alice")
                await lab.start("alice")
            async with asyncio.timeout(30):
                while "error budget of 2.5e-09 is used up" not in await reason(lab):
                    await asyncio.sleep(0.1)
        status = await lab.status("alice")
        assert status["next_block"] == 2 and status["error_budget_used"] <= status["error_budget"] == 2.5e-9
        assert len(lab.common()) <= 2


async def reason(lab: LinkLab) -> str:
    """What Alice says of herself, "" while she starts."""
    try:
        return str((await lab.status("alice"))["reason"])
    except KeySourceError:
        return ""


async def test_a_storm_costs_blocks_and_calm_weather_brings_them_back(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        await ask(tmp_path / "alice" / "eve.sock", {"weather": "storm"})
        await until_failed(lab, (await lab.status("alice"))["blocks_failed"] + 1)
        await ask(tmp_path / "alice" / "eve.sock", {"weather": "calm"})
        await lab.blocks(2)
        status = await lab.status("bob")
        assert status["state"] == "up" and status["ledger_balance"] == 0


async def until_failed(lab: LinkLab, count: int) -> None:
    async with asyncio.timeout(30):
        while (await lab.status("alice"))["blocks_failed"] < count:
            await asyncio.sleep(0.1)


async def test_kill_9_of_any_process_at_any_moment_uses_no_ticket_twice_and_heals(tmp_path: Path) -> None:
    chance = random.Random()
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        for round_number in range(48 if LONG else 3):
            victim = ("alice", "bob", "fibre")[round_number % 3]
            await asyncio.sleep(chance.uniform(0.0, 0.8))
            if victim == "fibre":
                pid = lab.fibre_pid()
                if pid is not None:
                    os.kill(pid, 9)
            else:
                await lab.kill(victim)
                await asyncio.sleep(chance.choice([0.0, 0.3]))
                await lab.start(victim)
            await lab.blocks(1)
        tickets = lab.proxy.tickets
        assert len(tickets) == len(set(tickets)), "a pad ticket was used twice"
        a, b = await lab.status("alice"), await lab.status("bob")
        assert abs(a["tickets_spent"] - b["tickets_spent"]) <= 1
        assert a["tickets_spent"] >= len(tickets) - 1


async def test_a_flipped_bit_on_the_wire_ends_the_block_raises_the_alarm_and_the_next_block_heals(
    tmp_path: Path,
) -> None:
    """In a frame of each phase and of each end."""
    async with LinkLab(tmp_path) as lab:
        waiting = [Kind.READY, Kind.SIFT, Kind.PARITY, Kind.VERIFY, Kind.AUTH, Kind.COMMIT]

        def flip(_sender: str, body: bytes) -> bytes:
            if not armed or body[0] != waiting[0]:
                return body
            armed.clear()
            lab.proxy.touched.append(waiting.pop(0).name)
            return body[:-1] + bytes([body[-1] ^ 1])

        armed: list[bool] = []
        lab.proxy.hands = flip
        await lab.start()
        lab.attach()
        for deed in range(len(waiting)):
            alarms = sum(len(client.alarm_log) for client in lab.clients.values())
            armed.append(True)
            await until(lambda deed=deed: len(lab.proxy.touched) > deed, 30, lab.words)
            await lab.blocks(1)
            log = [entry for client in lab.clients.values() for entry in client.alarm_log]
            assert len(log) > alarms and log[-1][1] == "authentication", lab.proxy.touched
            await until(lambda: not any(client.alarms for client in lab.clients.values()))
        for site in ("alice", "bob"):
            status = await lab.status(site)
            assert status["ledger_balance"] == 0 and status["blocks_failed"] >= 3


async def test_a_wire_that_flips_and_cuts_at_random_never_makes_ends_differ(tmp_path: Path) -> None:
    chance = random.Random()
    async with LinkLab(tmp_path) as lab:

        def disturb(sender: str, body: bytes) -> bytes | None:
            kind = Kind(body[0])
            likely = 0.004 if kind in (Kind.ASK, Kind.PARITY) else 0.04
            if kind in (Kind.PING, Kind.INVITE) or chance.random() > likely:
                return body
            lab.proxy.touched.append(kind.name)
            deed = chance.choice(["flip", "cut", "shorter"])
            if deed == "cut":
                return None
            if deed == "shorter" and len(body) > 1:
                return body[:-1]
            bit = chance.randrange(8 * len(body))
            return body[: bit // 8] + bytes([body[bit // 8] ^ 1 << bit % 8]) + body[bit // 8 + 1 :]

        lab.proxy.hands = disturb
        await lab.start()
        lab.attach()
        wanted = 100 if LONG else 6

        def touched_and_equal() -> bool:
            lab.common()  # asserts
            return len(lab.proxy.touched) >= wanted

        await until(touched_and_equal, 10 * wanted, lab.words)
        lab.proxy.hands = None
        await lab.blocks(1)
        tickets = lab.proxy.tickets
        assert len(tickets) == len(set(tickets))


async def test_a_block_that_one_end_lost_is_voided_at_the_other(tmp_path: Path) -> None:
    """Nobody takes Alice's blocks; she is killed with them.  Bob's client has them and is told to forget them."""
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach("bob")
        bob = lab.clients["bob"]
        await until(lambda: len(bob.blocks) >= 2, 30, lab.words)
        newest = max(bob.blocks)
        await lab.kill("alice")
        await lab.start("alice")
        await until(lambda: any(before > newest for before in bob.voids), 30, lab.words)
        assert all(block > newest for block in bob.blocks)
        lab.attach("alice")
        await lab.blocks(1)


async def test_a_restored_backup_refuses_to_run_and_says_why(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        backup = tmp_path / "bob" / "link-state" / "link.json"
        shutil.copy2(backup, tmp_path / "copy")
        await lab.blocks(2)
        await lab.stop("bob")
        shutil.copy2(tmp_path / "copy", backup)
        await lab.start("bob")
        async with asyncio.timeout(20):
            assert await lab.processes["bob"].wait() == 1
        assert "it is a backup, and would use pad twice" in lab.words()
        assert "Traceback" not in lab.words()


async def test_different_presets_are_named_at_both_ends_and_make_no_key(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        bob = lab.file("bob")
        bob.write_text(bob.read_text().replace('"demo"', '"lab10"'))
        await lab.start()

        async def reason(site: str) -> str:
            async with asyncio.timeout(15):
                while "preset" not in (said := (await lab.status(site))["reason"]):
                    await asyncio.sleep(0.1)
            return said

        await until(lambda: (tmp_path / "bob" / "link-state" / "status.sock").exists(), 15)
        assert "'demo'" in await reason("bob") and "'lab10'" in await reason("alice")
        assert not lab.proxy.tickets, "a mistake in a file must not cost pad"


async def test_another_pad_gets_nowhere_and_costs_nothing(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        (tmp_path / "bob" / "auth.pad").write_bytes(os.urandom(4096))
        await lab.start()
        await until(lambda: "does not have this link's pad" in lab.words(), 15)
        assert not lab.proxy.tickets


async def test_without_takers_the_link_sleeps_and_wakes_when_keys_are_taken(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach("bob")
        await until(lambda: (tmp_path / "alice" / "link-state" / "status.sock").exists(), 15)
        async with asyncio.timeout(60):
            while "sleeps" not in (status := await lab.status("alice"))["reason"]:
                await asyncio.sleep(0.2)
        blocks, before = status["blocks_passed"], cpu_seconds(lab)
        await asyncio.sleep(2.0)
        assert (await lab.status("alice"))["blocks_passed"] == blocks
        assert cpu_seconds(lab) - before < 0.4, "a link that sleeps costs next to nothing"
        lab.attach("alice")
        await lab.blocks(1)


def cpu_seconds(lab: LinkLab) -> float:
    """Of all three processes."""
    total = 0
    for pid in (lab.pid("alice"), lab.pid("bob"), lab.fibre_pid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def test_a_fibre_process_of_its_own_and_eve_by_its_file(tmp_path: Path) -> None:
    async with LinkLab(tmp_path, separate=True) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        assert "auth.pad" not in " ".join(p.name for p in (tmp_path / "fibre").iterdir())
        command = [sys.executable, "-m", "keysource.qkd", "eve", str(lab.file("fibre")), "on", "--fraction", "0.5"]
        run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert run.returncode == 0 and "50 %" in run.stdout
        await until(lambda: "qber" in lab.clients["bob"].alarms, 20, lab.words)
        await lab.kill("fibre")
        await lab.start("fibre")  # a new fibre has no Eve
        await lab.blocks(1)
        assert not lab.clients["bob"].alarms


async def test_an_end_runs_once(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        await lab.start("bob")
        await until(lambda: (tmp_path / "bob" / "link-state" / "link.json").exists())
        command = [sys.executable, "-m", "keysource.qkd", "run", str(lab.file("bob"))]
        run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert run.returncode == 2 and "another process of this link is running" in run.stderr
        assert "Traceback" not in run.stderr


async def until_a_block_has_flown_before_its_start(lab: LinkLab) -> None:
    """The fibre has flown blocks 0 to ``blocks - 1``; Alice has not begun ``next_block``."""
    async with asyncio.timeout(30):
        while True:
            flown = (await ask(lab.folder / "alice" / "eve.sock", {}))["blocks"]
            if flown > (await lab.status("alice"))["next_block"]:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("protocol", ["bb84-2decoy", "bbm92", "e91"])
async def test_every_protocol_delivers_equal_keys_and_sees_eve(tmp_path: Path, protocol: str) -> None:
    """Chosen by one line in both files; Alice, Bob and the fibre are processes."""
    async with LinkLab(tmp_path) as lab:
        for site in ("alice", "bob"):
            file = lab.file(site)
            file.write_text(file.read_text() + f'protocol = "{protocol}"\n')
        await lab.start()
        lab.attach()
        block = (await lab.blocks(1, within=60))[0]
        assert len(lab.clients["alice"].blocks[block]) >= 10 * 32
        a, b = await lab.both()
        assert a["protocol"] == protocol and a["ledger"] == b["ledger"] and a["ledger_balance"] == 0
        assert a["chsh"] == b["chsh"] and (a["chsh"] is not None and a["chsh"] > 2.4) == (protocol == "e91")
        if protocol == "bb84-2decoy":
            await until_a_block_has_flown_before_its_start(lab)
        await lab.eve(1.0)
        for site in ("alice", "bob"):
            await until(lambda site=site: "qber" in lab.clients[site].alarms, 40, lab.words)  # type: ignore[misc]
        a = await lab.status("alice")
        assert 0.2 < a["qber"] < 0.3 and a["ledger_balance"] == 0
        if protocol == "e91":
            assert abs(a["chsh"] - 2**0.5) < 0.2 and "Bell" in a["reason"]
        if protocol != "bb84-2decoy":
            with pytest.raises(KeySourceError, match="needs weak pulses"):
                await ask(tmp_path / "alice" / "eve.sock", {"attack": "photon-number"})
        await lab.eve(0.0)
        await lab.blocks(1, within=60)
