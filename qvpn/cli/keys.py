"""``qvpn genkey``, ``pubkey``, ``genpsk``: keys through pipes."""

from __future__ import annotations

import os
import stat
import sys
from typing import Annotated

import typer

from qvpn.cli.output import complain, fail, usage
from qvpn.config import identity
from qvpn.config.errors import IdentityError


def genkey(
    level: Annotated[int, typer.Option(help="3: ML-DSA-65 (suites 1, 2); 5: ML-DSA-87 (suite 3).")] = 3,
) -> None:
    """Write a new private identity to standard output: umask 077; qvpn genkey > alice.key"""
    if level not in identity.LEVELS:
        raise usage("--level is 3 (ML-DSA-65) or 5 (ML-DSA-87)")
    _warn_if_readable()
    _write(identity.generate(level).pem())


def pubkey() -> None:
    """Read a private identity from standard input, write its public key: qvpn pubkey < alice.key > alice.pub"""
    try:
        public = identity.parse_private(sys.stdin.buffer.read()).public
    except IdentityError as error:
        raise fail(f"qvpn: standard input {error.problem}") from None
    _write(public.pem())
    complain(f"fingerprint {public.readable}")


def genpsk() -> None:
    """Write a new pre-shared key to standard output; both sites get the same file, mode 0600."""
    _warn_if_readable()
    _write(identity.generate_psk())


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _warn_if_readable() -> None:
    """A secret goes into a file that others can read: say so (it is written all the same)."""
    try:
        info = os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):
        return
    if stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) & 0o077:
        complain("warning: the secret goes to a file that others can read; run: umask 077")
