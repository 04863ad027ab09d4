"""The command line: ``qvpn COMMAND``.  One file per group of commands; here is what they share.

No traceback reaches a user: what an operator can mend is one sentence, and everything else is one sentence too,
with the way to see more.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qvpn import __version__
from qvpn.cli import alarm, bench, doctor, init, keys, run, show
from qvpn.cli.output import FAILED, complain
from qvpn.config.errors import ConfigError
from qvpn.privileged import PrivilegedError
from qvpn.uapi import UapiError

# Typer brings its own copy of click in some releases; the root of its usage errors is the same in all of them.
_UsageErrors: type[Any] = typer.BadParameter.mro()[2]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

app = typer.Typer(
    name="qvpn",
    help="A site-to-site VPN: hybrid post-quantum handshake, session keys from QKD or another key source.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qvpn {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A site-to-site VPN: hybrid post-quantum handshake, session keys from QKD or another key source."""


for command in (
    init.init,
    keys.genkey,
    keys.pubkey,
    keys.genpsk,
    run.check,
    doctor.doctor,
    run.up,
    show.status,
    show.down,
    run.demo,
):
    app.command()(command)
app.add_typer(bench.bench)
app.add_typer(alarm.alarm)


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; never raises."""
    try:
        code = app(list(arguments), prog_name="qvpn", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _UsageErrors as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        complain("qvpn: interrupted")
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return FAILED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            _unexpected(error)
            return FAILED
        _silence_stdout()  # what it still holds cannot be written at exit either
        complain(f"qvpn: {error.filename}: {error.strerror}" if error.filename else f"qvpn: {error.strerror}")
        return FAILED
    except (ConfigError, PrivilegedError, UapiError) as error:
        complain(str(error) if isinstance(error, ConfigError) else f"qvpn: {error}")
        return FAILED
    except Exception as error:
        _unexpected(error)
        return FAILED


def _unexpected(error: Exception) -> None:
    """A mistake in the program.  The exception's own text may quote data, so only its kind and place are shown."""
    if os.environ.get("QVPN_DEBUG") == "1":
        traceback.print_exception(error)
        return
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    complain(
        f"qvpn: internal error: {type(error).__name__}{place}; run it again with QVPN_DEBUG=1 to see the details"
    )


def _silence_stdout() -> None:
    """Whoever read our output went away (``| head``): nothing more is to be said, at exit neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Console script ``qvpn``."""
    sys.exit(execute(sys.argv[1:]))
