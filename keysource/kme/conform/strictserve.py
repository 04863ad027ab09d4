"""The strict KME as a program: a test PKI in a folder, a listener, and a report when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from keysource import tls
from keysource.kme.conform.rules import Book
from keysource.kme.conform.strict import KME_ID, StrictKme
from keysource.kme.pki import Authority, write_new
from keysource.private import read_secret
from keysource.settings import Address


class ServeError(Exception):
    """It cannot begin; one sentence."""


def prepare(folder: Path, saes: tuple[str, str], host: str) -> None:
    """Certificates for the KME and both SAEs, unless they are there from last time.  Raises :class:`ServeError`."""
    names = (KME_ID, *saes)
    if (folder / "ca.crt").exists():
        for name in names:
            if not (folder / f"{name}.key").exists():
                raise ServeError(f"{folder}: there are certificates already, and none for {name!r}")
        return
    authority = Authority("test CA of a strict KME", days=90)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority.kme(KME_ID, [host, socket.gethostname(), "localhost", "127.0.0.1"]).write(folder, KME_ID)
        for sae in saes:
            authority.sae(sae).write(folder, sae)
        write_new(folder / "ca.crt", authority.certificate, 0o644)
    except OSError as error:
        raise ServeError(f"{error.filename}: {error.strerror}") from None


async def serve(
    folder: Path,
    address: Address,
    saes: tuple[str, str],
    book: Book,
    *,
    lessons: bool,
    seconds: float,
    ready: Callable[[str], None],
) -> None:
    """Until SIGINT, SIGTERM or so many seconds are over; ``ready`` is told the URL.  Raises :class:`ServeError`."""
    try:
        ca, own = ((folder / name).read_bytes() for name in ("ca.crt", f"{KME_ID}.crt"))
        context = tls.server_context(ca, own, read_secret(folder / f"{KME_ID}.key"))
    except OSError as error:
        raise ServeError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ServeError(f"{folder}: {error}") from None
    kme = StrictKme(saes, book, time.monotonic, lessons=lessons)
    runner = web.AppRunner(kme.application(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, address.host, address.port, ssl_context=context).start()
        port = runner.addresses[0][1]
        ready(f"https://{Address(host=address.host, port=port)}")
        await _stopped(seconds)
    except OSError as error:
        raise ServeError(f"{address}: {os.strerror(error.errno) if error.errno else error}") from None
    finally:
        await runner.cleanup()


async def _stopped(seconds: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds or None):
            await stop.wait()
