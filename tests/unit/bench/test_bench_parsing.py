"""What the benchmark reads: iperf3, ping, /proc, apt's sources."""

import json
import os

import pytest

from qvpn.bench import cpu, install, link, machine, tools
from qvpn.bench.errors import BenchError
from qvpn.bench.install import InstallError, suite_source

IPERF = {
    "end": {
        "sum_sent": {"bytes": 2_600_000_000, "seconds": 2.0, "retransmits": 7},
        "sum_received": {"bytes": 2_500_000_000, "seconds": 2.0, "bits_per_second": 1e10},
    }
}

PING = """PING 10.90.0.2 (10.90.0.2) 56(84) bytes of data.
64 bytes from 10.90.0.2: icmp_seq=1 ttl=64 time=0.900 ms
64 bytes from 10.90.0.2: icmp_seq=2 ttl=64 time=0.300 ms
64 bytes from 10.90.0.2: icmp_seq=3 ttl=64 time=0.200 ms

--- 10.90.0.2 ping statistics ---
4 packets transmitted, 3 received, 25% packet loss, time 40ms
rtt min/avg/max/mdev = 0.200/0.466/0.900/0.300 ms
"""


def test_iperf_counts_what_the_receiver_got() -> None:
    got = tools.parse_iperf(json.dumps(IPERF))
    assert got.gbits == pytest.approx(10.0)
    assert (got.bytes, got.retransmits) == (2_500_000_000, 7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("iperf3: command not found", "no JSON"),
        ('{"error": "unable to connect to server: Connection refused"}', "Connection refused"),
        ('{"end": {}}', "no totals"),
        (json.dumps({"end": {**IPERF["end"], "sum_received": {"bytes": 0, "seconds": 2}}}), "nothing was received"),
    ],
)
def test_an_iperf_that_measured_nothing_is_no_figure(text: str, reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        tools.parse_iperf(text)


def test_ping_median_and_tail() -> None:
    trips = tools.parse_ping(PING)
    assert (trips.sent, trips.received) == (4, 3)
    assert trips.median == 300.0
    assert trips.p99 == trips.worst == tools.LOST, "the one without an answer is the tail"


def test_p99_is_the_value_that_99_of_100_do_not_exceed() -> None:
    lines = "".join(f"time={value} ms\n" for value in range(1, 201))
    trips = tools.parse_ping(lines + "200 packets transmitted, 200 received")
    assert trips.p99 == 198_000


def test_a_ping_without_answers_is_no_figure() -> None:
    with pytest.raises(BenchError, match="no answer"):
        tools.parse_ping("5 packets transmitted, 0 received, 100% packet loss")


def test_cpu_counts_fields_behind_a_hostile_name() -> None:
    stat = "42 (a) b (c) S 7 1 1 0 -1 4194560 10 0 0 0 100 50 20 5 20 0 1 0 123 0 0"
    assert cpu.parse_stat(stat) == (7, 175)


def test_cpu_takes_descendants_and_nobody_else(tmp_path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    for pid, parent, user in ((10, 1, tick), (11, 10, 2 * tick), (12, 11, 4 * tick), (20, 1, 99 * tick)):
        (tmp_path / str(pid)).mkdir()
        stat = f"{pid} (x) S {parent} 1 1 0 -1 0 0 0 0 0 {user} 0 0 0 20 0 1 0 123"
        (tmp_path / str(pid) / "stat").write_text(stat)
    (tmp_path / "self").mkdir()
    assert cpu.seconds([10], tmp_path) == 7


def test_own_cpu_time_grows_with_work() -> None:
    before = cpu.seconds([os.getpid()])
    while cpu.seconds([os.getpid()]) <= before:
        sum(range(100_000))


def test_cpu_model_with_family() -> None:
    text = (
        "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: x\n"
    )
    assert machine.cpu_model(text) == "AMD EPYC (family 26 model 17)"


def test_udp_datagrams_sent() -> None:
    text = (
        "Ip: Forwarding\nIp: 1\nUdp: InDatagrams NoPorts InErrors OutDatagrams\nUdp: 5 6 7 8\nUdpLite: InDatagrams\n"
    )
    assert link.parse_udp_sent(text) == 8


DEB822 = """Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: contrib

Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def test_the_machines_own_source_with_another_suite() -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert suite_source(DEB822) == f"deb [signed-by={keyring}] http://mirror.example/debian trixie main\n"


def test_a_one_line_source_keeps_its_options() -> None:
    line = "# comment\ndeb [arch=amd64] http://mirror.example/debian bookworm main contrib\n"
    assert suite_source(line) == "deb [arch=amd64] http://mirror.example/debian trixie main\n"


def test_no_main_archive_is_said() -> None:
    with pytest.raises(InstallError, match="no main archive"):
        suite_source("Types: deb\nURIs: http://mirror.example/x\nSuites: y\nComponents: contrib\n")


def test_unpacked_programs_come_before_the_systems(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QVPN_BENCH_CACHE", str(tmp_path))
    assert install.find("no-such-program") is None
    with pytest.raises(BenchError, match="no-such-program is not installed"):
        install.need("no-such-program")
    place = tmp_path / "root/usr/bin/sh"
    place.parent.mkdir(parents=True)
    place.write_text("#!/bin/sh\n")
    place.chmod(0o755)
    assert install.find("sh") == place
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions/shell").write_text("1.2-3\n")
    assert install.package_version("shell", place) == "1.2-3 (Debian trixie)"
