"""How commands end: one sentence on standard error and an exit code of 0 (fine), 1 (it failed) or 2 (wrong usage)."""

from __future__ import annotations

import sys

import typer

FAILED, USAGE = 1, 2


def complain(sentence: str) -> None:
    """One line on standard error."""
    print(" ".join(sentence.split()), file=sys.stderr)


def fail(sentence: str, code: int = FAILED) -> typer.Exit:
    """Say why and give what is to be raised."""
    complain(sentence)
    return typer.Exit(code)


def usage(sentence: str) -> typer.Exit:
    """Wrong usage: exit code 2."""
    return fail(f"qvpn: {sentence}", USAGE)
