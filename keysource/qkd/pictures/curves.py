"""Pictures of formulas and measurements: rates, ledger, detection delay, repeaters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from keysource.qkd.pictures.base import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, blank
from keysource.qkd.vigil import FRACTIONS, RATES, Delay, expected_delay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
PUBLISHED: dict[str, tuple[Points, str]] = {
    "Lucamarini 2013, 1 GHz": (((35, 2.20e6), (50, 1.09e6), (65, 0.40e6), (80, 0.12e6)), "o"),
    "Islam 2017, 2.5 GHz, 4-dim.": (((20, 26.2e6), (40, 11.9e6), (50, 7.71e6), (70, 3.40e6), (83, 1.07e6)), "s"),
    "Yuan 2018, 1 GHz": (((10, 13.72e6),), "^"),
    "Boaron 2018, 2.5 GHz, ULL": (((405, 6.5),), "D"),
    "Li 2023, 2.5 GHz": (((10, 115.8e6),), "*"),
}
"""(km, secret bit/s) as published: Sci. Adv. 3 e1701491 Table 1 (dB at 0.2 dB/km for the first two), arXiv:1807.04484
(2 dB), PRL 121 190502, arXiv:2307.02364."""


def rate(curves: Mapping[str, Points], own: Mapping[str, tuple[float, float]]) -> Figure:
    """``curves`` of formulas (km, bit/s), ``own`` points that links in real processes delivered."""
    figure, axes = blank(8.4, 5.4)
    for (name, points), color in zip(curves.items(), (GREY, BLUE, GREEN, ORANGE, VIOLET), strict=False):
        shown = [(km, bits) for km, bits in points if bits > 0.0]
        style = "--" if "PLOB" in name else "-"
        axes.semilogy([km for km, _b in shown], [b for _km, b in shown], style, color=color, label=name)
    for name, (found, marker) in PUBLISHED.items():
        xs, ys = [km for km, _b in found], [b for _km, b in found]
        axes.semilogy(xs, ys, marker, color="#333333", mfc="none", ms=8 if marker != "*" else 11, label=name)
    for i, (name, (km, bits)) in enumerate(own.items()):
        axes.semilogy([km], [bits], "P", color=RED, ms=9, label="delivered by qvpn-qkd" if i == 0 else None)
        axes.annotate(
            name, (km, bits), textcoords="offset points", xytext=(0, -15), ha="center", fontsize=8, color=RED
        )
    axes.set_xlim(0, 430)
    axes.set_ylim(1, 1e10)
    axes.set_xlabel("fibre in km")
    axes.set_ylabel("secret bits per second of the link")
    axes.set_title("Rate against distance, with published experiments", fontsize=11)
    axes.legend(fontsize=7.5, ncols=2, loc="upper right")
    return figure


def ledger(columns: Mapping[str, int], title: str) -> Figure:
    """From detections to keys, every column that is not zero."""
    names = [name for name, bits in columns.items() if bits and name not in ("raw", "delivered")]
    figure, axes = blank(9.0, 4.8)
    axes.bar([0], [columns["raw"]], color=BLUE)
    level = columns["raw"]
    tops = [columns["raw"]]
    for i, name in enumerate(names, start=1):
        axes.bar([i], [columns[name]], bottom=[level - columns[name]], color=ORANGE if name != "lost" else RED)
        axes.plot([i - 1.4, i + 0.4], [level, level], color=GREY, lw=0.7)
        tops.append(level)
        level -= columns[name]
    axes.bar([len(names) + 1], [columns["delivered"]], color=GREEN)
    tops.append(max(level, columns["delivered"]))
    amounts = [columns["raw"], *(columns[name] for name in names), columns["delivered"]]
    for i, (top, bits) in enumerate(zip(tops, amounts, strict=True)):
        sign = "" if i in (0, len(names) + 1) else "−"
        axes.annotate(f"{sign}{bits:,}", (i, top), textcoords="offset points", xytext=(0, 4), ha="center", fontsize=8)
    axes.set_xticks(range(len(amounts)), ["raw", *names, "delivered"], rotation=30, ha="right", fontsize=9)
    axes.set_ylim(0, 1.1 * columns["raw"])
    axes.set_ylabel("bits")
    axes.grid(visible=False, axis="x")
    axes.set_title(title, fontsize=11)
    return figure


def delay(measured: Mapping[float, Sequence[Delay]]) -> Figure:
    """Published bits until the alarm against the rate of false alarms, for fractions of intercept-resend."""
    figure, axes = blank(8.4, 5.0)
    for fraction, color in zip(FRACTIONS, (RED, ORANGE, GREEN, BLUE, VIOLET), strict=True):
        axes.loglog(RATES, [expected_delay(fraction, rate) for rate in RATES], color=color, lw=1.2)
        found = measured[fraction]
        errors = [2 * each.spread for each in found]
        axes.errorbar(RATES, [each.measured for each in found], yerr=errors, fmt="o", ms=4, color=color, capsize=2)
        last = found[-1]
        axes.annotate(
            f"{100 * fraction:g} %", (last.false_alarms, last.measured), textcoords="offset points", xytext=(9, -3),
            color=color, fontsize=9,
        )  # fmt: skip
    axes.invert_xaxis()
    axes.set_xlim(2e-1, 2e-10)
    axes.set_xlabel("false alarms: probability that an honest link ever raises one")
    axes.set_ylabel("published bits until the alarm")
    axes.set_title("Intercept-resend of a fraction of the pulses, at 2 % errors without Eve", fontsize=11)
    axes.plot([], [], color=GREY, label="Wald's formula")
    axes.errorbar(
        [], [], yerr=[], fmt="o", ms=4, color=GREY, capsize=2, label="measured on simulated clicks, 2 sigma"
    )
    axes.legend(fontsize=8, loc="upper left")
    return figure


def repeaters(kms: Sequence[float], columns: Mapping[str, Sequence[float]]) -> Figure:
    """Secret bits per second of chains beside direct transmission."""
    figure, axes = blank(8.4, 4.8)
    for (name, rates), color in zip(columns.items(), (BLUE, GREEN, VIOLET, ORANGE, GREY, RED), strict=False):
        shown = [(km, rate) for km, rate in zip(kms, rates, strict=True) if rate > 0.0]
        style = "--" if "at most" in name else "o-"
        axes.semilogy([km for km, _r in shown], [r for _km, r in shown], style, ms=3.5, color=color, label=name)
    axes.set_ylim(1e-4, 1e10)
    axes.set_xlabel("fibre in km, 0.2 dB/km")
    axes.set_ylabel("secret bits per second")
    axes.set_title("Repeater chains (simulated) beside direct transmission and trusted nodes", fontsize=11)
    axes.legend(fontsize=8, loc="upper right")
    return figure
