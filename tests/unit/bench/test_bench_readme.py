"""The README's table comes from results.json and from nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qvpn.bench import readme
from qvpn.bench.cases import PEERS, plan
from qvpn.bench.chart import svg
from qvpn.bench.link import LINKS
from qvpn.bench.readme import BEGIN, END, put, section
from qvpn.bench.results import Results, Row

MACHINE = {
    "date": "2026-01-01 00:00 UTC",
    "cpu": "Example 9000",
    "cores": "2",
    "kernel": "6.18",
    "commit": "0123456789",
    "python": "3.11",
    "cryptography": "50",
    "numpy": "2",
    "load": "0.00 0.00 0.00",
}


def full_run() -> Results:
    """Every case that ``make bench`` measures; ours is always twice the others."""
    found = Results(dict(MACHINE), rounds=3, seconds=2)
    for case in plan(tuple(PEERS), tuple(LINKS)):
        tunnel = case.tunnel
        row = Row(tunnel.name, case.link.name, tunnel.cipher, tunnel.version())
        for number in range(3):
            factor = (2 if tunnel.name.startswith("qvpn") else 1) * (1 + number)
            row.note(number, {"tcp1_gbits": 1.5 * factor, "load_p99_us": 4000.0 * factor})
        found.rows.append(row)
    return found


def test_every_row_says_its_cipher_and_ours_its_suite() -> None:
    text = section(full_run(), "deploy/bench")
    whole, mark, carriers = text.partition("Where only QUIC or only TCP passes:")
    for name, cipher, suite in (
        ("qvpn", "AES-256-GCM", "suite 01 (ML-KEM-768, ML-DSA-65)"),
        ("qvpn suite 02", "ChaCha20-Poly1305", "suite 02 (ML-KEM-768, ML-DSA-65)"),
        ("qvpn suite 03", "AES-256-GCM", "suite 03 (ML-KEM-1024, ML-DSA-87)"),
    ):
        (line,) = (line for line in whole.splitlines() if re.match(rf"\| {name} +\|", line))
        assert cipher in line and suite in line
    assert "| 6.00 " in text  # 1.5 x 2 x the second of three rounds
    for said in ("Example 9000", "0123456789", "2026-01-01", "3 interleaved rounds"):
        assert said in text
    for link in ("default", "tx-off", "no-uso", "jumbo"):
        name = "wireguard-go" if link == "default" else f"wireguard-go, {LINKS[link].about}"
        (line,) = (line for line in text.splitlines() if re.match(rf"\| {re.escape(name)} +\| 2.00", line))
        assert line.count("2.00") == 2
    assert mark and "over quic |" not in whole and "| openvpn over tcp " not in whole
    (line,) = (line for line in carriers.splitlines() if re.match(r"\| qvpn over quic +\| 0", line))
    assert "| 6.00 (3.00–9.00)" in line and "| 16.0 (8.0–24.0)" in line
    assert "fastest" not in text.lower()
    assert "ping beside four full TCP streams" in svg(full_run())


def test_it_is_put_between_the_marks_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    folder.mkdir()
    (folder / "results.json").write_text(full_run().to_json())
    target = tmp_path / "README.md"
    target.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert readme.main([str(folder / "results.json"), str(target)]) == 0
    text = target.read_text()
    assert text.startswith(f"before\n{BEGIN}\n![") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and text.count("qvpn suite 03") == 1


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_marks_that_are_wrong_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="once each"):
        put(text, "new")
    target = tmp_path / "README.md"
    target.write_text(text)
    source = tmp_path / "results.json"
    source.write_text(full_run().to_json())
    assert readme.main([str(source), str(target)]) == 1
    assert "once each" in capsys.readouterr().err
    assert target.read_text() == text
    assert readme.main([]) == 2


def test_the_projects_readme_has_the_marks() -> None:
    text = Path(__file__).resolve().parents[3].joinpath("README.md").read_text()
    assert "table" in put(text, "table")
