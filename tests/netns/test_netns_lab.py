"""The lab itself: routes, isolation of folders, measuring programs, and that it ends with its maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload
from qvpn.demo.lab import Lab
from qvpn.demo.process import ProcessFailed, environment, module

MARKER = payload.new_marker()
TRAFFIC = "qvpn.demo.traffic"


def _udp(lab: Lab, here: str, there: str, *more: str) -> list[str]:
    wan = topology.WAN4
    return module(
        TRAFFIC, "udp", "--bind", f"{wan[here]}:9000", "--peer", f"{wan[there]}:9000", "--marker", MARKER.hex(), *more
    )


def _drop(lab: Lab, condition: str) -> None:
    rules = f"table inet t {{\n chain f {{\n type filter hook forward priority 0;\n {condition} drop\n }}\n}}\n"
    lab["net"].run(["nft", "-f", "-"], text=rules)


@pytest.mark.parametrize("addresses", [topology.WAN4, topology.WAN6], ids=["ipv4", "ipv6"])
def test_the_sites_reach_each_other_through_the_net(lab: Lab, addresses: dict[str, str]) -> None:
    command = module(TRAFFIC, "ping", "--peer", addresses["bob"], "--count", "3", "--interval", "0.02")
    result = lab["alice"].start("ping", command).result(10)
    assert (result["sent"], result["received"]) == (3, 3)
    assert lab["net"].interfaces()["to-bob"]["tx_packets"] >= 3


def test_the_fibre_is_no_way_between_the_sites(lab: Lab) -> None:
    command = module(TRAFFIC, "ping", "--peer", topology.FIBRE4["bob"], "--count", "1", "--timeout", "0.3")
    assert lab["alice"].start("ping", command).result(10)["received"] == 0
    command = module(TRAFFIC, "ping", "--peer", topology.FIBRE_END4["alice"], "--count", "1", "--timeout", "2")
    assert lab["alice"].start("ping", command).result(10)["received"] == 1


def test_losses_of_the_network_are_counted_exactly(lab: Lab) -> None:
    _drop(lab, "udp dport 9000 ip saddr 192.0.2.2 numgen inc mod 10 == 3")
    load = measure.Load(lab, topology.WAN4, MARKER, rate=500, linger=0.3)
    load.begin()
    time.sleep(0.5)
    loss = load.finish()
    dropped = loss.missing["alice"]
    assert loss.sent >= 300
    assert dropped[:3] == [3, 13, 23]
    assert loss.lost == len(dropped) or loss.lost == len(dropped) + 1  # the very last packet has no higher one
    assert loss.missing["bob"] == []
    assert loss.duplicates == loss.refused == loss.socket_drops == 0


def test_a_transfer_has_the_same_hash_at_both_ends(lab: Lab) -> None:
    done = measure.transfer(lab, "alice", "bob", topology.WAN6["bob"], MARKER, total=5_000_000)
    assert done.same_hash
    assert done.bytes == 5_000_000
    assert done.bits_per_second == int(done.bytes * 8 / done.seconds)


def test_a_capture_finds_plaintext_where_there_is_some(lab: Lab) -> None:
    command = module(
        "qvpn.demo.capture", "--interface", "to-alice", "--marker", MARKER.hex(), "--inner", "192.0.2.0/24"
    )
    capture = lab["net"].start("capture", command)
    capture.until_output(10)
    assert measure.transfer(lab, "alice", "bob", topology.WAN4["bob"], MARKER, total=3_000_000).same_hash
    seen = capture.finish()
    assert seen["frames_with_plaintext"] > 40
    assert seen["frames_with_inner_address"] >= seen["frames_with_plaintext"]
    assert seen["truncated"] == seen["unseen"] == 0


def test_a_capture_does_not_find_another_runs_plaintext(lab: Lab) -> None:
    other = payload.new_marker().hex()
    capture = lab["net"].start("capture", module("qvpn.demo.capture", "--interface", "to-alice", "--marker", other))
    capture.until_output(10)
    lab["alice"].start("udp", _udp(lab, "alice", "bob", "--seconds", "0.2", "--linger", "0")).result(10)
    seen = capture.finish()
    assert seen["frames"] > 50
    assert seen["frames_with_plaintext"] == 0


def test_a_site_sees_its_own_folder_only(lab: Lab) -> None:
    for site in topology.SITES:
        (lab.site_folder(site) / f"{site}.txt").write_text(site)
    script = f"pwd; ls; cat alice.txt; ls -A {lab.folder} | wc -l; ls /run"
    process = lab["alice"].start("look", ["sh", "-c", script], site=True)
    assert process.wait(5) == 0
    assert process.out.read_text().split() == ["/run/site", "alice.txt", "alice0", "site"]


def test_what_a_site_writes_is_in_its_folder(lab: Lab) -> None:
    assert lab["bob"].start("write", ["sh", "-c", "echo hello >here"], site=True).wait(5) == 0
    assert (lab.site_folder("bob") / "here").read_text() == "hello\n"


def test_stopping_a_process_ends_its_whole_group(lab: Lab) -> None:
    process = lab["alice"].start("family", ["sh", "-c", "sleep 1000 & echo '{\"child\": '$!'}'; wait"])
    child = process.until_output(5)["child"]
    process.stop()
    _wait_gone(child)


def test_a_program_that_ends_badly_is_told_with_its_last_words(lab: Lab) -> None:
    process = lab["alice"].start("bad", ["sh", "-c", "echo it broke >&2; exit 3"])
    with pytest.raises(ProcessFailed, match=r"alice-bad ended with code 3: it broke"):
        process.result(5)


def test_a_program_that_is_not_there_is_one_sentence(lab: Lab) -> None:
    process = lab["alice"].start("none", ["/does/not/exist"])
    assert process.wait(5) == 1
    assert process.tail() == [
        "launch: cannot start /does/not/exist: [Errno 2] No such file or directory",
    ]


_HOLDER = """
import os, sys, time
from pathlib import Path
from qvpn.demo import lab
held = lab.two_sites(Path(sys.argv[1]))
child = held["alice"].start("sleep", ["sleep", "1000"], site=True)
print(os.stat(f"/proc/self/fd/{held['alice'].descriptor}").st_ino, child.pid, flush=True)
time.sleep(1000)
"""


def test_sigkill_of_the_labs_maker_ends_its_processes_and_namespaces(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "held")], stdout=subprocess.PIPE, text=True, env=environment()
    ) as holder:
        assert holder.stdout is not None
        inode, child = (int(word) for word in holder.stdout.readline().split())
        holder.send_signal(signal.SIGKILL)
    _wait_gone(child)
    assert not [link for link in _network_namespaces() if link == inode]


def _network_namespaces() -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.append(process.stat().st_ino)
        except OSError:
            continue
    return found


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} still runs")
