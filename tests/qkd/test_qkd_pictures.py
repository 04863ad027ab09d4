"""Pictures draw what they are given; the sequential test behind one of them does what Wald says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from keysource.qkd import plotscli
from keysource.qkd.cli import app
from keysource.qkd.errors import LinkSettings
from keysource.qkd.ledger import Ledger
from keysource.qkd.pictures import curves, page
from keysource.qkd.pictures.base import blank, save, wanted
from keysource.qkd.vigil import BASELINE, alarms, expected_delay, false_alarms, measure, sifted_errors, with_eve


@pytest.mark.parametrize(
    ("fraction", "bits"), [(1.0, 45.15), (0.25, 392.6), (0.1, 1886), (0.05, 6655), (0.01, 146_450)]
)  # fmt: skip
def test_detection_takes_bits(fraction: float, bits: int) -> None:
    """ln(1e9) over the relative entropy of 2 % and 2 % + fraction x 24 %, worked out independently."""
    assert expected_delay(fraction, 1e-9) == pytest.approx(bits, rel=0.002)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_measured_delays_are_walds_plus_a_little_overshoot(fraction: float) -> None:
    found = measure(fraction, runs=200, seed=3)
    for each in found:
        step = math.log(with_eve(fraction) / BASELINE)  # an alarm overshoots the limit by at most one error's step
        most = each.expected * (1.0 + step / math.log(1.0 / each.false_alarms))
        assert each.expected - 4 * each.spread < each.measured < most + 4 * each.spread


def test_an_honest_link_raises_no_more_alarms_than_promised() -> None:
    limit, runs = 0.05, 400
    share = false_alarms(0.25, limit, runs, seed=4)
    assert 0.0 < share < limit + 4 * math.sqrt(limit / runs)


def test_the_test_counts_bits_to_the_first_crossing() -> None:
    wrong = np.array([False] * 10 + [True] * 8)
    (first,) = alarms(wrong, 1.0, [1e-3])
    up, down = math.log(with_eve(1.0) / BASELINE), math.log((1 - with_eve(1.0)) / (1 - BASELINE))
    totals = [sum(up if each else down for each in wrong[: end + 1]) for end in range(len(wrong))]
    assert first == 1 + next(at for at, total in enumerate(totals) if total >= math.log(1e3))
    assert alarms(np.zeros(100, dtype=bool), 1.0, [1e-3]) == [None]


def test_errors_of_a_seed_repeat_and_have_the_ratio_they_should() -> None:
    from keysource.qkd.optics.eve import InterceptResend

    one, two = (sifted_errors(InterceptResend(0.5), 20_000, seed=9) for _ in range(2))
    assert (one == two).all() and len(one) == 20_000
    assert abs(one.mean() - with_eve(0.5)) < 4.5 * math.sqrt(0.14 / 20_000)


def test_pictures_are_files_that_repeat(tmp_path: Path) -> None:
    columns = Ledger(raw=100, discarded=40, check=10, amplified=30, delivered=20).as_dict()
    for name in ("a.svg", "b.svg"):
        save(curves.ledger(columns, "a ledger"), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    save(curves.rate({"at most (PLOB)": [(10.0, 1e6), (50.0, 0.0)]}, {"x": (20.0, 1e3)}), tmp_path / "c.png")
    save(curves.repeaters([10.0, 20.0], {"direct, at most": [1.0, 0.0]}), tmp_path / "d.pdf")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("c.png", "d.pdf"))


def test_where_a_plot_cannot_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path / "a.doc", tmp_path / "nowhere" / "a.png"):
        with pytest.raises(LinkSettings):
            wanted(path)
    figure, _axes = blank()
    with pytest.raises(LinkSettings):
        save(figure, tmp_path / "nowhere" / "a.png")


def test_the_plots_command_writes_its_facts_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotscli, "_CHAINS", (2,))
    ran = CliRunner().invoke(app, ["plots", str(tmp_path), "--only", "repeaters"])
    assert ran.exit_code == 0, ran.output
    facts = json.loads((tmp_path / "figures.json").read_text())["repeaters"]
    assert "2 links, 1000 memories each" in facts["rates"] and len(facts["km"]) == 25
    assert (tmp_path / "repeaters.svg").stat().st_size < 150_000
    refused = CliRunner().invoke(app, ["plots", str(tmp_path), "--only", "moon"])
    assert isinstance(refused.exception, LinkSettings) and "none of rate" in str(refused.exception)


FOLDER = Path(curves.__file__).parents[1]


def test_the_page_says_what_its_figures_say() -> None:
    """Numbers between the markers of the page are those of the run that made the pictures beside it."""
    text, facts = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "plots" / "figures.json").read_text())
    assert set(re.findall(r"<!-- made: (\w+) -->", text)) == set(page.TABLES)
    assert page.rendered(text, facts) == text, "make them again: qvpn-qkd plots keysource/qkd/plots --page ..."


def test_a_marked_table_is_written_anew_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- made: links -->\nold\n<!-- end -->\nafter\n")
    page.rewrite(file, {"rate": {"delivered": {"demo": [20.0, 1234.4]}}})
    text = file.read_text()
    assert text.startswith("before\n<!-- made: links -->\n| link") and text.endswith("<!-- end -->\nafter\n")
    assert "| demo, 20 km | 1,234 |" in text and "old" not in text
    page.rewrite(file, {})
    assert file.read_text() == text, "facts that are not there change nothing"
    delay = {"false_alarms": 1e-9, "expected": 45.1, "measured": 46.2, "spread": 1.0, "runs": 400}
    file.write_text("<!-- made: detection -->\n<!-- end -->\n")
    page.rewrite(file, {"detection": {"1": [delay | {"false_alarms": 0.1}, delay]}})
    assert "| 100 % | 45 | 46 ± 2 (2 sigma, 400 runs) |" in file.read_text()
    eve: dict[str, object] = {"held": 999, "sifted": 1000, "final_bits": 2048, "determined": 0}
    eve["cut_short"] = {"final_bits": 25461, "determined_at_least": 1500}
    file.write_text("<!-- made: eve -->\n<!-- end -->\n")
    page.rewrite(file, {"photon-number-splitting": eve, "beam-splitting": eve})
    assert "999 of 1,000 sifted" in file.read_text() and "1,500 or more of 25,461" in file.read_text()
    file.write_text("<!-- made: moon -->\n<!-- end -->\n")
    with pytest.raises(LinkSettings, match="nothing makes"):
        page.rewrite(file, {})
    with pytest.raises(LinkSettings, match="No such file"):
        page.rewrite(tmp_path / "nowhere.md", {})
