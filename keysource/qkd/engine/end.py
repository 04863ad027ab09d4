"""One end of a link as a process: device socket, state, the fibre's connection, and one session at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from keysource.base import KEY_BYTES, End, Origin
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.errors import KeySourceError
from keysource.qkd.config import EndConfig
from keysource.qkd.distill.mac import TAGS, TICKET_BYTES, Authenticator
from keysource.qkd.distill.party import Outcome, Terms
from keysource.qkd.distill.signed import SignedTicket
from keysource.qkd.distill.wire import Reason
from keysource.qkd.engine.control import Control
from keysource.qkd.engine.doubt import Doubt
from keysource.qkd.engine.frontends import FrontEnd, Live, Recorded
from keysource.qkd.engine.hardware import Hardware
from keysource.qkd.engine.hello import AgreedTerms
from keysource.qkd.engine.report import KEPT_REPORTS, report
from keysource.qkd.engine.verdicts import ALARMS, SENTENCES, authenticity, randomness, withhold
from keysource.qkd.errors import LinkError, StateLost
from keysource.qkd.files import lock_folder
from keysource.qkd.identity import Signers
from keysource.qkd.ledger import Ledger
from keysource.qkd.optics.entangled import PairOptics, watched
from keysource.qkd.optics.monitors import Readings, alarm
from keysource.qkd.pad import FIRST_REFILLS, SIGNED, LinkState
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates.proofs import proof_name

log = structlog.get_logger("qkd.link")
_FIRST_PAUSE = 0.25
_FORGERY = 8.0 * 2.0**32 / 2.0**106
"""Of a tag over a transcript of at most 64 GiB."""
_RATE_WINDOW = 30.0


class LinkDevice(DeviceServer):
    """The device socket; tells when a client has taken over blocks."""

    def __init__(self, path: Path, info: DeviceInfo, taken: Callable[[int], None], max_keys: int) -> None:
        super().__init__(path, info, max_keys=max_keys)
        self._taken = taken

    def erase(self, before: int) -> None:
        self._taken(before)
        super().erase(before)


class LinkEnd:
    """Everything of one end that outlives a connection."""

    def __init__(self, config: EndConfig, signers: Signers | None = None) -> None:
        """``signers``: where the first block is signed.  Raises :class:`LinkSettings` for files that are missing or
        wrong."""
        self.config, self.signers = config, signers
        self.preset = PRESETS[config.preset]
        self._lock = lock_folder(config.state)
        self.plan = self.preset.plan(tests=config.tests)
        optics = self.preset.optics
        self.terms = Terms(self.plan, optics.source, optics.p_z, self.preset.security)
        digest = self.plan.digest(optics, self.preset.security)
        signed = signers is not None
        self.state = LinkState(config.state, config.auth_key, config.name, config.end.value, signed=signed)
        self.name = self.state.link
        bootstrap = "signature" if signed else "psk"
        self.agreed = AgreedTerms(
            link=self.name,
            owner=config.owner.value,
            auth_bootstrap=bootstrap,
            preset=self.preset.name,
            efficiency_tests=config.tests,
            repeatable=config.test_seed is not None,
            plan=digest,
        )
        self.session = b""
        """Names this session, made of both ends' fresh randomness."""
        info = DeviceInfo(
            f"simulated {self.preset.protocol} link ({self.preset.name})",
            self.name,
            config.end,
            config.owner,
            Origin.SIMULATED,
        )
        self.device = LinkDevice(config.socket, info, self._taken, self.max_keys)
        measures = config.end is End.B or isinstance(optics, PairOptics)
        key, test = self.state.link_key(b"fibre"), config.tests and measures
        self.hardware: FrontEnd = Hardware(config.end, config.fibre, key, digest, test=test)
        if config.records is not None:
            front = Recorded if config.front_end == "recorded" else Live
            self.hardware = front(config.end, config.records, pairs=isinstance(optics, PairOptics))
        self.control = Control(config.state / "status.sock", self._command)
        self.held: set[int] = set()
        self.ledger = Ledger()
        self.passed = self.failed = 0
        self.failures_in_a_row = 0
        self.qber: float | None = None
        self.chsh: float | None = None
        """S of the last block; E91 only."""
        self.session_up = False
        self.trouble = "the other end was not reached yet"
        self.last_reason: str | None = None
        self._deliveries: deque[tuple[float, int]] = deque()
        self._doubt = Doubt(self.preset.block_seconds)
        self.slowness: float | None = None
        """Wall seconds from one passed block to the next, per second that its pulses take on the real link."""
        self._last_passed: float | None = None
        self._standing: set[str] = set()
        self._reports: deque[dict[str, Any]] = deque(maxlen=KEPT_REPORTS)
        self._guard_said: str | None = None

    @property
    def end(self) -> End:
        return self.config.end

    @property
    def block_error(self) -> float:
        """Secrecy, correctness and authentication of one block.  Block numbers are on disk and never come back, so
        their count bounds what the link's keys add up to, whatever crashed; blocks that gave nothing count too."""
        security = self.preset.security
        return security.secrecy + security.correctness + TAGS * _FORGERY

    @property
    def most_refills(self) -> int:
        """Tickets that a signed block may give, so that a key is left of it."""
        return max(1, min(FIRST_REFILLS, (self.plan.length - 8 * KEY_BYTES) // (8 * TICKET_BYTES)))

    @property
    def keys_per_block(self) -> int:
        """At most: a block that refills one ticket."""
        return self.plan.length // (8 * KEY_BYTES)

    @property
    def max_keys(self) -> int:
        """Stock at the device socket: clients take blocks over at once, this is what waits for them."""
        return max(256, 4 * self.keys_per_block)

    async def start(self) -> None:
        """Raises :class:`KeySourceError` where a socket cannot be used."""
        await self.device.start()
        try:
            await self.control.start()
        except KeySourceError as error:
            log.warning("no status socket", reason=str(error))  # a long path: keys flow all the same
        self.hardware.start()
        self.show()

    async def aclose(self) -> None:
        await self.hardware.aclose()
        await self.control.aclose()
        await self.device.aclose()

    # Before a block

    def waiting_for(self) -> str | None:
        """What a new block lacks at this end, None where nothing."""
        if self.block_error > self.config.error_limit:
            error = f"of preset {self.preset.name} is up to {self.block_error:.3g}"
            return f"the error of one block {error}, more than error_limit = {self.config.error_limit:.3g} allows"
        if not self.hardware.ready:
            return self.hardware.trouble
        if (self.state.next_block + 1) * self.block_error > self.config.error_limit:
            limit = f"{self.config.error_limit:.3g} is used up after {self.state.next_block} blocks"
            return f"the error budget of {limit}: the link stops; make a new pad (qvpn-qkd pair)"
        if self.device.room() < self.keys_per_block:
            return "the stock is full, nobody takes the keys: the link sleeps"
        return None

    def authenticator(self, number: int, block: int) -> Authenticator:
        """Burn the ticket ``number`` for a block, on disk, or the block's number where it is signed.

        Raises :class:`BadFrame`, :class:`PadEmpty`.
        """
        if number != SIGNED or self.signers is None:
            return self.state.spend(number, block)
        self.state.spend_signed(block)
        return SignedTicket(number, self.signers, self.session)

    def may_look_ahead(self) -> bool:
        """May the pulses of the next block fly while this one is distilled?  Not where it would find no room, and not
        after blocks that gave nothing: then the pause between blocks is kept."""
        if not self.hardware.looks_ahead or self.failures_in_a_row or self.waiting_for() is not None:
            return False
        return self.device.room() >= 2 * self.keys_per_block

    @property
    def pause(self) -> float:
        """Seconds to wait after blocks that gave nothing: each costs a ticket."""
        if not self.failures_in_a_row:
            return 0.0
        return float(min(self.preset.abort_wait, _FIRST_PAUSE * 2.0 ** min(self.failures_in_a_row - 1, 20)))

    @property
    def patience(self) -> float:
        """Seconds for the pulses of one block."""
        return 60.0 + 3.0 * self.preset.block_seconds

    def guard(self, readings: Readings | None) -> str | None:
        """What this end's monitors say of a block's readings: a sentence where one fires, or where there
        are none to look at though a monitor is configured."""
        if readings is not None:
            site = watched(self.preset.optics, int(self.config.end is End.B))
            sentence = alarm(self.config.monitor, readings, site)
        else:
            missing = f'a record without readings, and monitor = "{self.config.monitor}" wants them'
            sentence = None if self.config.monitor == "none" else missing
        self._guard_said = sentence
        if sentence is not None:
            log.warning("monitor", reason=sentence)
        return sentence

    # After a block

    def finish(self, outcome: Outcome, now: float) -> None:
        """Count a block and deliver what it gave.  ``now`` in seconds of a steady clock."""
        if self.agreed.repeatable:
            withhold(outcome)
        self.ledger.add(outcome.ledger)
        self.qber = outcome.qber if outcome.qber is not None else self.qber
        self.chsh = outcome.chsh[0] if outcome.chsh is not None else self.chsh
        if outcome.reason is None:
            self._deliver(outcome, now)
        else:
            self._fail(outcome.reason)
        ledger = outcome.ledger
        self._reports.append(report(outcome, self.preset, self.plan) | {"monitor": self._guard_said})
        self._guard_said = None
        log.info(
            "block",
            number=outcome.block,
            result="passed" if outcome.reason is None else outcome.reason.name.lower(),
            keys=len(outcome.keys) // KEY_BYTES,
            qber=None if outcome.qber is None else round(outcome.qber, 5),
            leaked=ledger.leaked,
            messages=outcome.messages,
            tickets=self.state.tickets_left,
        )
        self.show()

    def _deliver(self, outcome: Outcome, now: float) -> None:
        self.passed += 1
        self.failures_in_a_row = 0
        self._doubt.passed()
        if self._last_passed is not None:
            self.slowness = round((now - self._last_passed) / self.preset.block_seconds, 2)
        self._last_passed = now
        self._deliveries.append((now, len(outcome.keys) // KEY_BYTES))
        while now - self._deliveries[0][0] > _RATE_WINDOW:
            self._deliveries.popleft()
        if not self.agreed.repeatable:  # keys that anybody can work out are nobody's
            self.held.add(outcome.block)
            self.device.publish(outcome.block, outcome.keys)
        for kind in ("qber", "device", "monitor", "authentication"):
            self._clear(kind)
        self.last_reason = None

    def _fail(self, reason: Reason) -> None:
        self.failed += 1
        self.failures_in_a_row += 1
        self.last_reason = SENTENCES[reason]
        kind = ALARMS[reason] if self._doubt.lost(reason) else None
        if kind is not None:
            detail = SENTENCES[reason]
            if reason is Reason.QBER and self.qber is not None:
                detail = f"{detail}: {100 * self.qber:.1f} %"
            self._raise(kind, detail)

    def broken(self, error: Exception) -> None:
        """A block ended with the connection: its ticket is burnt."""
        self.failed += 1
        self.failures_in_a_row += 1
        self.last_reason = str(error)
        self._reports.append({"block": self.state.next_block - 1, "result": "broken", "said": str(error), "keys": 0})

    def tampered(self, detail: str) -> None:
        """The classical channel carried something that the other end did not send."""
        self._raise("authentication", detail)

    def _raise(self, kind: str, detail: str) -> None:
        log.warning("alarm", kind=kind, detail=detail)
        self._standing.add(kind)
        self.device.alarm(True, kind, detail)

    def _clear(self, kind: str) -> None:
        if kind in self._standing:
            self._standing.discard(kind)
            log.info("alarm cleared", kind=kind)
            self.device.alarm(False, kind, "a block passed")

    # Blocks of both ends

    def void(self) -> None:
        """A block is at one end only: both forget what is unused of all blocks so far."""
        before = self.state.next_block
        log.warning("blocks voided", before=before)
        self.held.clear()
        self.device.void(before)
        if before:
            self.state.acknowledge(before - 1)

    def _taken(self, before: int) -> None:
        taken = {block for block in self.held if block < before}
        if taken:
            self.held -= taken
            try:
                self.state.acknowledge(max(taken))
            except StateLost as error:  # the next block will end the process; at worst blocks are voided
                log.error("acknowledgement lost", reason=str(error))
            self.show()

    @property
    def authenticity(self) -> str:
        return authenticity(signs=self.signers is not None, unproven=self.state.unproven)

    # Status

    def key_rate(self, now: float) -> float | None:
        """Keys per second over the last half minute."""
        recent = [(at, keys) for at, keys in self._deliveries if now - at <= _RATE_WINDOW]
        if not recent:
            return None if not self.passed else 0.0
        span = max(now - recent[0][0], self.preset.block_seconds)
        return sum(keys for _at, keys in recent[1:] or recent) / span

    def show(self) -> None:
        """Put what is the case on the device socket."""
        now = asyncio.get_running_loop().time()
        waiting = self.waiting_for()
        if not self.session_up:
            state, reason = ("down" if self.passed or self.failed else "starting"), self.trouble
        elif not self.hardware.ready:
            state, reason = "down", self.hardware.trouble
        elif self.last_reason is not None:
            state, reason = "aborted", self.last_reason
        else:
            state, reason = "up", waiting or ""
        self.device.set_status(state, reason[:400], qber=self.qber, key_rate=self.key_rate(now))

    def _command(self, request: dict[str, Any]) -> dict[str, Any]:
        self.show()
        status = self.device.status()
        if (since := request.get("since")) is not None:
            if not isinstance(since, int):
                raise LinkError("since is a block number")
            return {"blocks": [each for each in self._reports if each["block"] >= since]}
        return {
            "link": self.name,
            "end": self.end.value,
            "origin": Origin.SIMULATED.value,
            "warning": "SIMULATED: no quantum security",
            "randomness": randomness(self.config),
            "preset": self.preset.name,
            "about": self.preset.about,
            "pace": self.hardware.pace,
            "seconds_per_simulated_second": self.slowness,
            "state": status.state,
            "reason": status.reason,
            "qber": status.qber,
            "key_rate": status.key_rate,
            "alarm": status.alarm,
            "next_block": self.state.next_block,
            "blocks_held": status.blocks_held,
            "blocks_passed": self.passed,
            "blocks_failed": self.failed,
            "tickets_left": self.state.tickets_left,
            "tickets_spent": self.state.spent,
            "auth_bootstrap": self.agreed.auth_bootstrap,
            "authenticity": self.authenticity,
            "signed_blocks": self.state.signed_blocks,
            "error_budget_used": self.state.next_block * self.block_error,
            "error_budget": self.config.error_limit,
            "protocol": self.preset.protocol,
            "proof": proof_name(self.terms.source),
            "chsh": None if self.chsh is None else round(self.chsh, 4),
            "monitor": self.config.monitor,
            "ledger": self.ledger.as_dict(),
            "ledger_balance": self.ledger.balance(),
        }
