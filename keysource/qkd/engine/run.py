"""The processes' main loops: Alice waits for Bob, Bob connects, a fibre runs beside or inside Alice's host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import structlog

from keysource.base import End
from keysource.private import write_private
from keysource.qkd import randomness
from keysource.qkd.config import Address, EndConfig, FibreConfig
from keysource.qkd.engine.channel import Channel
from keysource.qkd.engine.end import LinkEnd
from keysource.qkd.engine.fibre import Fibre
from keysource.qkd.engine.hello import MAX_HELLO
from keysource.qkd.engine.introduce import Request
from keysource.qkd.engine.leash import die_with_parent
from keysource.qkd.engine.qrng import Qrng
from keysource.qkd.engine.session import alice_session, bob_session, greet_alice, greet_bob, prove_alice
from keysource.qkd.errors import BadFrame, Fatal, LinkError, LinkSettings, PeerLost
from keysource.qkd.files import lock_folder, read_private
from keysource.qkd.identity import Signers, load_signers
from keysource.qkd.pad import HEAD_BYTES
from keysource.qkd.presets import PRESETS
from keysource.qkd.records import ASSUMPTIONS

log = structlog.get_logger("qkd.run")
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
_MAX_STRANGERS = 16


async def run(config: EndConfig | FibreConfig) -> None:
    """Run one process until SIGTERM or SIGINT.  Raises :class:`LinkError` for what will not heal."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    work = asyncio.create_task(_fibre(config) if isinstance(config, FibreConfig) else _end(config))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not work.done():
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _end(config: EndConfig) -> None:
    randomness.use(_draws(config))
    signers = signers_of(config)
    if signers is not None:
        await _get_head(config, signers)
    link = LinkEnd(config, signers)
    await link.start()
    log.info(
        "link end runs",
        link=link.name,
        end=config.end.value,
        preset=config.preset,
        keys_per_block=link.keys_per_block,
        warning="SIMULATED: no quantum security",
    )
    if signers is not None:
        log.warning("authenticity", rests_on=link.authenticity)
    say = log.info if config.records is None else log.warning
    for sentence in ASSUMPTIONS:
        say("assumed of the devices, checked by nothing", assumption=sentence)
    try:
        async with asyncio.TaskGroup() as group:
            if config.spawn_fibre:
                group.create_task(_keep_fibre(config, link.state.link_key(b"fibre")))
            group.create_task(Listener(link).run() if config.end is End.A else _connect(link))
    except* LinkError as errors:
        raise errors.exceptions[0] from None
    finally:
        await link.aclose()


def _draws(config: EndConfig) -> randomness.Draw:
    """Where this site's choices come from.  Raises :class:`LinkSettings`, :class:`BadRandomness`."""
    if config.test_seed is not None:
        log.warning("deterministic test mode", delivers="no key")
        return randomness.Repeatable(f"{config.end.value} {config.test_seed}")
    if config.qrng is None:
        return randomness.system
    path, entropy = config.qrng
    return randomness.Mixed(Qrng(path), entropy)


def signers_of(config: EndConfig) -> Signers | None:
    """Where the first block is signed.  Raises :class:`LinkSettings`."""
    if config.identities is None:
        return None
    return load_signers(config.end, str(config.name), *config.identities)


async def _get_head(config: EndConfig, signers: Signers) -> None:
    """The link's first secret: Alice draws it, Bob asks her for it until he has it."""
    descriptor = lock_folder(config.state)
    try:
        if not config.auth_key.exists():
            mine = config.end is End.A
            head = os.urandom(HEAD_BYTES) if mine else await _asked(config.classical, signers)
            write_private(config.auth_key, head)
    except OSError as error:
        raise LinkSettings(f"{config.auth_key}: {error.strerror}") from None
    finally:
        os.close(descriptor)


async def _asked(address: Address, signers: Signers) -> bytes:
    wait, said = _FIRST_WAIT, ""
    while True:
        try:
            channel = await _dial(address)
            try:
                request = Request(signers)
                await channel.send(request.frame())
                return request.take_answer_untrusted(await channel.receive(5.0, MAX_HELLO))
            finally:
                await channel.aclose()
        except LinkError as error:
            if str(error) != said:
                log.info("not introduced yet", reason=str(error))
            said = str(error)
        await asyncio.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


class Listener:
    """Alice's side: one session at a time; a newcomer that has proved the pad ends the one before."""

    def __init__(self, link: LinkEnd) -> None:
        self._link = link
        self._session: asyncio.Task[None] | None = None
        self._strangers: set[asyncio.Task[None]] = set()
        self._fatal: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Raises :class:`Fatal`, or :class:`LinkError` where it cannot listen."""
        address = self._link.config.classical
        self._fatal = asyncio.get_running_loop().create_future()
        try:
            server = await asyncio.start_server(self._accept, address.host, address.port)
        except OSError as error:
            raise LinkError(f"cannot listen at {address}: {error.strerror or error}") from None
        try:
            await self._fatal
        finally:
            server.close()
            tasks = [*self._strangers, *([self._session] if self._session else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        channel = Channel(reader, writer)
        if task is None or len(self._strangers) >= _MAX_STRANGERS:
            await channel.aclose()
            return
        self._strangers.add(task)
        try:
            await self._welcome(channel)
        except Fatal as error:
            if self._fatal is not None and not self._fatal.done():
                self._fatal.set_exception(error)
        except LinkError as error:
            self._note(error)
        except asyncio.CancelledError:
            pass
        finally:
            self._strangers.discard(task)
            if self._session is task:
                self._session = None
            await channel.aclose()

    async def _welcome(self, channel: Channel) -> None:
        greeting, claims = await prove_alice(self._link, channel)
        old, self._session = self._session, asyncio.current_task()
        if self._session is not None:
            self._strangers.discard(self._session)
        if old is not None:
            old.cancel()
            await asyncio.gather(old, return_exceptions=True)
        await greet_alice(self._link, channel, greeting, claims)
        log.info("the other end is here")
        await alice_session(self._link, channel)

    def _note(self, error: LinkError) -> None:
        level = log.warning if isinstance(error, BadFrame) else log.info
        level("connection ended", reason=str(error))
        if not self._link.session_up:
            self._link.trouble = str(error)
            self._link.show()


async def _connect(link: LinkEnd) -> None:
    """Bob's side: connect for ever.  Raises :class:`Fatal`."""
    wait, address = _FIRST_WAIT, link.config.classical
    while True:
        try:
            channel = await _dial(address)
            try:
                await greet_bob(link, channel)
                log.info("the other end is here")
                wait = _FIRST_WAIT
                await bob_session(link, channel)
            finally:
                await channel.aclose()
        except Fatal:
            raise
        except LinkError as error:
            if str(error) != link.trouble:
                log.info("no connection", reason=str(error))
            link.trouble = str(error)
            link.show()
        await asyncio.sleep(max(wait, link.pause))
        wait = min(2 * wait, _LONGEST_WAIT)


async def _dial(address: Address) -> Channel:
    try:
        async with asyncio.timeout(5):
            return Channel(*await asyncio.open_connection(address.host, address.port))
    except (OSError, TimeoutError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "timeout"
        raise PeerLost(f"the other end at {address} does not answer ({reason})") from None


# The fibre


async def _fibre(config: FibreConfig) -> None:
    try:
        key = read_private(config.key, "the fibre's key")
    except FileNotFoundError:
        raise LinkSettings(f'{config.key}: key "key": there is no such file') from None
    await serve_fibre(Fibre(config.listen, PRESETS[config.preset], config.pace, config.control, key))


async def serve_fibre(fibre: Fibre) -> None:
    await fibre.start()
    try:
        await asyncio.Event().wait()
    finally:
        await fibre.aclose()


async def _keep_fibre(config: EndConfig, key: bytes) -> None:
    """The fibre as a child of Alice's process: told everything through a pipe, started again when it dies."""
    wait = _FIRST_WAIT
    errand = {
        "parent": os.getpid(),
        "host": config.fibre.host,
        "port": config.fibre.port,
        "preset": config.preset,
        "pace": config.pace,
        "control": None if config.control is None else str(config.control),
        "key": key.hex(),
    }
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "keysource.qkd", "fibre-child"), stdin=asyncio.subprocess.PIPE
        )
        try:
            if process.stdin is not None:
                process.stdin.write(json.dumps(errand).encode() + b"\n")
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        wait = _FIRST_WAIT if loop.time() - began > 10 else min(2 * wait, _LONGEST_WAIT)
        log.warning("the fibre process ended", code=code, again_in=wait)
        await asyncio.sleep(wait)


async def fibre_child() -> None:
    """What the child runs: its errand is one JSON line on standard input."""
    errand = json.loads(await asyncio.to_thread(sys.stdin.readline))
    die_with_parent(errand["parent"])
    listen = Address(errand["host"], errand["port"])
    preset, key = PRESETS[errand["preset"]], bytes.fromhex(errand["key"])
    control = None if errand["control"] is None else Path(errand["control"])
    await serve_fibre(Fibre(listen, preset, errand["pace"], control, key))
