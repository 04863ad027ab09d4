"""The tables of the documentation page whose numbers come from runs: written anew between their markers.

A table stands between ``<!-- made: NAME -->`` and ``<!-- end -->``; what is between is this module's, the rest of the
page is people's.  The numbers are those of ``figures.json``, so that page and pictures never tell two stories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keysource.qkd.errors import LinkSettings

_SECTION = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WATCHED = "1e-09"


def rewrite(page: Path, facts: Mapping[str, Any]) -> None:
    """Replace every marked table of ``page`` whose facts are there.  Raises :class:`LinkSettings`."""
    try:
        old = page.read_text(encoding="utf-8")
        new = rendered(old, facts)
        if new != old:
            page.write_text(new, encoding="utf-8")
    except OSError as error:
        raise LinkSettings(f"{page}: {error.strerror}") from None


def rendered(text: str, facts: Mapping[str, Any]) -> str:
    """``text`` with its marked tables made from ``facts``.  Raises :class:`LinkSettings` for an unknown marker."""

    def table(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise LinkSettings(f"a table {name!r} that nothing makes; there are {', '.join(TABLES)}")
        needed, make = TABLES[name]
        return f"{found[1]}{make(facts)}{found[3]}" if all(each in facts for each in needed) else found[0]

    return _SECTION.sub(table, text)


def _eve(facts: Mapping[str, Any]) -> str:
    pns, beam = facts["photon-number-splitting"], facts["beam-splitting"]
    share = f"{pns['held']:,} of {pns['sifted']:,}"
    cut = beam["cut_short"]
    short = f"{cut['determined_at_least']:,} or more of {cut['final_bits']:,} if hashed as though no light leaked"
    caught = "fits | nothing where it fires, else **all** | **all of it** where nothing fires"
    rows = (
        "| attack | errors | gains | monitors | tag | delivered | of the final key she has |",
        "|---|---|---|---|---|---|---|",
        "| `intercept-resend`, fraction p | + p/4 | as before | silent | fits | nothing beyond the QBER limit"
        " | 0 bits |",
        "| `photon-number-splitting` | as before | signal up, decoy down: single-photon bound fails | silent | fits"
        f" | nothing | 0; she held {share} sifted bits at 17 dB, so without decoys nearly all |",
        "| `beam-splitting` | as before | as before | silent | fits | **all: nothing fires**"
        f" | {beam['determined']} of {beam['final_bits']:,} by rank; {short} |",
        f"| `blinding --mode cw` | as before | as before | `photocurrent` fires, `efficiency` does not | {caught} |",
        "| `blinding --mode pulsed` | as before | as before | `efficiency` fires, `photocurrent` does not"
        f" | {caught} |",
        "| `man-in-the-middle` | – | – | – | fails | nothing of that block | – |",
    )
    return "\n".join(rows) + "\n"


def _links(facts: Mapping[str, Any]) -> str:
    rows = [
        "| link in real processes (`qvpn-qkd simulate --preset NAME --blocks 2 --pace fast`) | secret bit/s of the"
        " simulated link |",
        "|---|---|",
    ]
    rows += [f"| {name}, {km:g} km | {rate:,.0f} |" for name, (km, rate) in facts["rate"]["delivered"].items()]
    return "\n".join(rows) + "\n"


def _detection(facts: Mapping[str, Any]) -> str:
    rows = [
        "| intercept-resend of | bits to the alarm at 10^-9, Wald | measured on the sampler's clicks"
        " (`plots --only detection`) |",
        "|---|---|---|",
    ]
    for fraction, delays in sorted(facts["detection"].items(), key=lambda item: -float(item[0])):
        (last,) = [each for each in delays if f"{each['false_alarms']:.0e}" == _WATCHED]
        measured = f"{last['measured']:,.0f} ± {2 * last['spread']:,.0f} (2 sigma, {last['runs']} runs)"
        rows.append(f"| {100 * float(fraction):g} % | {last['expected']:,.0f} | {measured} |")
    return "\n".join(rows) + "\n"


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], str]]] = {
    "eve": (("photon-number-splitting", "beam-splitting"), _eve),
    "links": (("rate",), _links),
    "detection": (("detection",), _detection),
}
"""Facts that a table needs, and what makes it of them."""
