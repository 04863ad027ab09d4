"""``qvpn bench net`` from the command line: ours beside the bare link, figures, balanced counters, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qvpn.bench import cpu
from qvpn.bench.errors import Unbalanced
from qvpn.bench.floor import NAMES
from qvpn.bench.measure import take
from qvpn.demo.process import environment, program


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [*program("qvpn"), "bench", "net", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(), check=False)


@pytest.fixture(autouse=True)
def _tools() -> None:
    missing = [tool for tool in ("iperf3", "ping", "ethtool") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def test_a_short_run_ends_green_and_its_counters_balance(tmp_path: Path) -> None:
    measures = "tcp1,udp,hot"
    done = _bench("--rounds", "1", "--seconds", "1", "--measures", measures, "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    rows = {row["tunnel"]: row for row in said["rows"]}
    assert set(rows) == {"no tunnel", "qvpn"}
    assert said["failures"] == []
    for name in ("tcp1_gbits", "udp_pps", "hot_us", "cpu_s_per_gb"):
        assert rows["qvpn"]["figures"][name][0] > 0, name
    counts = rows["qvpn"]["counts"][0]
    assert counts["opened"] == counts["marked"] > 1000
    assert counts["source_checks"] == counts["tun_writes"] + counts["tun_refused"] > 100
    assert counts["rekeys"] >= 1
    assert "2/2, round 1" in done.stderr
    assert json.loads((tmp_path / "out/results.json").read_text()) == said
    assert "qvpn" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/chart.svg").read_text().startswith("<svg")


@pytest.mark.skipif(os.environ.get("QVPN_TEST_LONG") != "1", reason="half a minute: QVPN_TEST_LONG=1 runs it")
def test_quic_and_openvpn_over_tcp_are_measured_beside_udp(tmp_path: Path) -> None:
    done = _bench(
        "--carriers", "--rounds", "1", "--seconds", "1", "--measures", "tcp1,load", "--json", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    rows = {row["tunnel"]: row["figures"] for row in said["rows"]}
    assert {"qvpn", "qvpn over quic"} <= set(rows)
    assert ("openvpn over tcp" in rows) != ("openvpn over tcp" in said["absent"])
    for figures in rows.values():
        assert figures["tcp1_gbits"][0] > 0 and figures["load_p99_us"][0] > 0
    assert rows["qvpn over quic"]["load_lost"][0] == 0
    assert "### Where only QUIC or only TCP passes" in (tmp_path / "results.md").read_text()


def test_an_absent_peer_is_said_to_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVPN_BENCH_CACHE", str(tmp_path))
    if shutil.which("nebula"):
        pytest.skip("nebula is installed in this system")
    done = _bench("--rounds", "1", "--seconds", "1", "--measures", "idle", "--peers", "nebula")
    assert done.returncode == 0, done.stderr
    assert "nebula: absent, nebula and nebula-cert not installed" in done.stderr
    assert "absent: nebula and nebula-cert not installed" in done.stdout


def test_wrong_names_are_refused_before_anything_starts() -> None:
    done = _bench("--peers", "strongswan")
    assert done.returncode == 2
    assert "there is no 'strongswan'" in done.stderr


def test_unbalanced_counters_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real daemons run; one count of what they say is changed on the way."""
    from qvpn.bench import cases
    from qvpn.demo.sites import Daemon

    honest = Daemon.status

    def lying(self: Daemon) -> dict[str, object]:
        status = honest(self)
        for peer in status["peers"]:  # none yet right after its start
            peer["marked"] += 1
        return status

    monkeypatch.setattr(Daemon, "status", lying)
    case = next(case for case in cases.plan((), ("default",), ("idle",), extras=False) if case.tunnel.name == "qvpn")
    with pytest.raises(Unbalanced, match="counters marked"):
        take(case, tmp_path / "lab", 1)


def _descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.name)], _ = cpu.parse_stat((entry / "stat").read_text())
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def _is_iperf(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "iperf3"
    return False


def test_an_interrupted_run_leaves_no_process() -> None:
    command = [*program("qvpn"), "bench", "net", "--rounds", "9", "--seconds", "9", "--measures", "tcp1"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    ) as bench:
        deadline = time.monotonic() + 60
        children: set[int] = set()
        while time.monotonic() < deadline and not any(map(_is_iperf, children)):
            children = _descendants(bench.pid)
            time.sleep(0.1)
        assert len(children) >= 3, "unshare, its process 1, and iperf3"
        bench.send_signal(signal.SIGINT)
        _, said = bench.communicate(timeout=20)
    assert bench.returncode == 130
    assert said.splitlines()[-1] == "qvpn bench: interrupted; nothing is left behind"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_the_floor_has_all_its_parts() -> None:
    command = [*program("qvpn"), "bench", "floor", "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    said = {(row["part"], row["cipher"]): row["microseconds"] for row in json.loads(done.stdout)["floor"]}
    assert set(said) == {
        ("system calls alone", "none"),
        *((part, cipher) for part in ("AEAD calls alone", "packet path", "floor: both") for cipher in NAMES.values()),
    }
    assert all(value > 0 for value in said.values())
