"""``python -m keysource.conformance FACTORY``: examine a key source of anybody's.

FACTORY is ``MODULE:NAME`` or ``FILE.py:NAME`` of a pair factory (``keysource.conformance``) without arguments.
Exit codes: 0 it conforms, 1 it does not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

from keysource.conformance import CHECKS, DISTURBANCES, DRAWS, Check, PairFactory, Verdict, examine
from keysource.conformance import concurrent_draws_share_no_key as concurrent_draws


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m keysource.conformance", description=__doc__)
    parser.add_argument("factory", metavar="FACTORY")
    parser.add_argument("--draws", type=int, default=2 * DRAWS, help="concurrent draws in all; 10000 is thorough")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of lines")
    chosen = parser.parse_args(arguments)
    if chosen.draws < 2:
        parser.error("--draws is at least 2")
    try:
        factory = load_factory(chosen.factory)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    verdicts = asyncio.run(_examine(factory, chosen.draws, quiet=chosen.json))
    if chosen.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    failed = sum(verdict.result == "fail" for verdict in verdicts)
    if not chosen.json:
        print("conforms" if not failed else f"does not conform: {failed} of {len(verdicts)} checks fail")
    return 1 if failed else 0


def load_factory(name: str) -> PairFactory:
    """Raises ``ValueError``, one sentence."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{name!r} is not MODULE:NAME or FILE.py:NAME")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ValueError(f"{place}: is no Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return cast(PairFactory, getattr(module, attribute))
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"{name}: does not load: {error}") from None


async def _examine(factory: PairFactory, draws: int, *, quiet: bool) -> list[Verdict]:
    verdicts = []
    for check in (*CHECKS, *DISTURBANCES):
        chosen: Check = check
        if check is concurrent_draws:
            chosen = partial(concurrent_draws, draws=draws)
            chosen.__name__ = concurrent_draws.__name__  # type: ignore[attr-defined]
        verdict = await examine(factory, chosen)
        verdicts.append(verdict)
        if not quiet:
            print(f"{verdict.result:<11}{verdict.check}" + (f": {verdict.sentence}" if verdict.sentence else ""))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
