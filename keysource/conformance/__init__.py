"""Is it a key source?  A suite for any :class:`~keysource.base.KeySource`, ours and yours.

Write a *pair factory*: an asynchronous context manager that gives both ends of a fresh pair, started, and closes
them afterwards.  Then, on the command line, ``python -m keysource.conformance FILE.py:my_pair``; or with pytest::

    @asynccontextmanager
    async def my_pair(folder):
        ...
        yield Pair(left, right, "sae-left", "sae-right")

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_my_source(check, tmp_path):
        await check(partial(my_pair, tmp_path))

A check raises :class:`NotConforming` with a sentence.  Each end must be able to issue at least ``DRAWS`` keys (the
check of concurrent draws takes ``draws`` as an argument); keys may come while the check runs.  Where all keys belong
to one end, the other raises ``NotOwner`` and the suite goes by that.

:data:`DISTURBANCES` need more of the pair: a ``restart`` of one end, an ``outage`` of what both rest on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from keysource.conformance.checks import (
    a_key_is_given_once,
    both_ends_have_equal_keys,
    cancelling_returns_no_key,
    claims_fit,
    closing_twice_is_fine_and_final,
    concurrent_draws_share_no_key,
    status_tells_and_consumes_nothing,
    strange_arguments_raise_key_source_errors,
    texts_hide_the_key,
    unknown_key_ids_are_refused,
)
from keysource.conformance.disturbances import a_restart_gives_no_key_again, an_outage_is_said_and_heals
from keysource.conformance.pairs import AT_ONCE, DRAWS, PATIENCE, End, NotConforming, NotTested, Pair, PairFactory

__all__ = [
    "AT_ONCE",
    "CHECKS",
    "DISTURBANCES",
    "DRAWS",
    "PATIENCE",
    "Check",
    "End",
    "NotConforming",
    "NotTested",
    "Pair",
    "PairFactory",
    "Verdict",
    "concurrent_draws_share_no_key",
    "examine",
    "run_all",
]

Check = Callable[[PairFactory], Awaitable[None]]

CHECKS: tuple[Check, ...] = (
    both_ends_have_equal_keys,
    a_key_is_given_once,
    unknown_key_ids_are_refused,
    concurrent_draws_share_no_key,
    cancelling_returns_no_key,
    texts_hide_the_key,
    status_tells_and_consumes_nothing,
    closing_twice_is_fine_and_final,
    claims_fit,
    strange_arguments_raise_key_source_errors,
)
DISTURBANCES: tuple[Check, ...] = (a_restart_gives_no_key_again, an_outage_is_said_and_heals)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one check."""

    check: str
    result: str
    """``pass``, ``fail`` or ``not tested``."""
    sentence: str = ""


async def examine(pair_factory: PairFactory, check: Check) -> Verdict:
    """One check on a fresh pair, as a verdict instead of an exception."""
    name = getattr(check, "__name__", str(check))
    try:
        await check(pair_factory)
    except NotTested as error:
        return Verdict(name, "not tested", str(error))
    except NotConforming as error:
        return Verdict(name, "fail", str(error))
    except Exception as error:
        return Verdict(name, "fail", f"{type(error).__name__}: {error}")
    return Verdict(name, "pass")


async def run_all(pair_factory: PairFactory) -> list[str]:
    """Every check on a fresh pair; gives the names of those that were done.

    Raises:
        NotConforming: the first that fails.
    """
    done = []
    for check in (*CHECKS, *DISTURBANCES):
        name = getattr(check, "__name__", str(check))
        try:
            await check(pair_factory)
        except NotTested:
            continue
        except NotConforming as error:
            raise NotConforming(f"{name}: {error}") from None
        done.append(name)
    return done
