"""The examination of a KME: two SAEs that may share keys, one question after the other, about a hundred keys in all.

A check is a function with the clause and the requirement that it stands for.  It returns what it saw, or raises
``Failed``, ``Warned`` or ``Skipped``.  What the standard leaves open is never called a failure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keysource.kme.conform.caller import Answer, Caller, NoAnswer, Notebook
from keysource.kme.conform.report import Failed, Outcome, Skipped, Verdict, Warned, plain


@dataclass(slots=True)
class Kit:
    """What checks have to work with."""

    master: Caller
    slave: Caller
    """At its own KME."""
    ca: bytes
    """PEM: what the SAEs believe, and so the authority of the KME's certificate."""
    notebook: Notebook
    status: dict[str, Any] = field(default_factory=dict)
    """The last one that was whole."""
    key_ids: set[str] = field(default_factory=set)
    tags: set[bytes] = field(default_factory=set)
    """Hashes of all keys drawn, to notice one that comes twice; see :meth:`note`."""

    @property
    def key_size(self) -> int:
        """Bits, as the KME says; 256 where it says nothing."""
        size = self.status.get("key_size")
        return size if isinstance(size, int) and size > 0 else 256

    async def draw(self, **fields: Any) -> dict[str, bytes]:
        """The master draws by POST; key_ID -> key.  Raises ``Failed``, ``Skipped``."""
        answer = await self.master.patiently("POST", self.slave.sae, "enc_keys", body=fields)
        if answer.status != 200:
            raise Skipped(f"no key could be drawn for this: {answer.told()}")
        return self.note(keys_of(answer, fields.get("size", self.key_size)))

    async def fetch(self, key_ids: Sequence[str], **how: Any) -> Answer:
        """The slave asks for them by POST."""
        body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
        return await self.slave.patiently("POST", self.master.sae, "dec_keys", body=body, **how)

    def note(self, keys: dict[str, bytes]) -> dict[str, bytes]:
        """Raises ``Failed``: one of them was drawn before."""
        for key_id, key in keys.items():
            name = str(uuid.UUID(key_id))
            if name in self.key_ids:
                raise Failed(f"key_ID {name} was given out twice")
            tag = hashlib.sha256(key).digest()
            if tag in self.tags and len(key) >= 16:  # shorter ones may well be equal
                raise Failed("the same bytes were given out under two key_IDs")
            self.key_ids.add(name)
            self.tags.add(tag)
        return keys


Work = Callable[[Kit], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    clause: str
    requirement: str
    work: Work


CHECKS: list[Check] = []


def check(clause: str, requirement: str) -> Callable[[Work], Work]:
    """Add a function to the examination; its name is the check's."""

    def add(work: Work) -> Work:
        CHECKS.append(Check(work.__name__.replace("_", "-"), clause, requirement, work))
        return work

    return add


async def examine(kit: Kit, told: Callable[[Verdict], None] = lambda verdict: None) -> list[Verdict]:
    """All checks, in order; ``told`` hears of each as it is done."""
    verdicts: list[Verdict] = []
    for one in every_check():
        if verdicts and verdicts[0].outcome is Outcome.FAIL:  # no connection at all
            verdict = Verdict(one.name, one.clause, one.requirement, Outcome.SKIP, "there was no connection")
        else:
            verdict = await _verdict(kit, one)
        told(verdict)
        verdicts.append(verdict)
    return verdicts


def every_check() -> list[Check]:
    """In the order of the examination."""
    for part in _PARTS:  # they add themselves
        importlib.import_module(f"{__package__}.{part}")
    return sorted(CHECKS, key=lambda one: _PARTS.index(one.work.__module__.rpartition(".")[2]))


_PARTS = ("connection", "state", "drawing", "fetching")


async def _verdict(kit: Kit, one: Check) -> Verdict:
    try:
        outcome, found = Outcome.PASS, await one.work(kit)
    except Failed as error:
        outcome, found = Outcome.FAIL, str(error)
    except Warned as error:
        outcome, found = Outcome.WARN, str(error)
    except Skipped as error:
        outcome, found = Outcome.SKIP, str(error)
    except NoAnswer as error:
        outcome, found = Outcome.FAIL, str(error)
    except Exception as error:  # an answer that nobody foresaw must not end the examination
        outcome, found = Outcome.FAIL, f"an answer that cannot be made sense of ({type(error).__name__})"
    return Verdict(one.name, one.clause, one.requirement, outcome, found)


# What several checks look at


def keys_of(answer: Answer, size: int) -> dict[str, bytes]:
    """Of a Key container (clause 6.3): key_ID -> key, each of ``size`` bits.  Raises ``Failed``."""
    entries = answer.object().get("keys")
    if not isinstance(entries, list) or not entries:
        raise Failed(f'{answer.asked}: no array "keys" with keys in the answer')
    keys = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise Failed(f'{answer.asked}: an element of "keys" is not an object')
        key_id, key = entry.get("key_ID"), entry.get("key")
        if not isinstance(key_id, str) or not isinstance(key, str):
            raise Failed(f"{answer.asked}: a key without key_ID or key, as strings")
        try:
            uuid.UUID(key_id)
            material = base64.b64decode(key, validate=True)
        except binascii.Error:
            raise Failed(f"{answer.asked}: a key is not base64") from None
        except ValueError:
            raise Failed(f"{answer.asked}: key_ID {plain(key_id, 40)!r} is not a UUID") from None
        if len(material) != -(-size // 8):
            raise Failed(f"{answer.asked}: a key of {8 * len(material)} bits where {size} were asked for")
        keys[key_id] = material
    if len(keys) != len(entries):
        raise Failed(f"{answer.asked}: a key_ID twice in one answer")
    return keys


def refused(answer: Answer, message: str = "") -> str:
    """A 400 with an Error (clause 6.5); ``message`` is one that the standard gives word for word.

    Raises:
        Failed: another class of status.
        Warned: another 4xx, or other words.
    """
    if not 400 <= answer.status < 500:
        raise Failed(f"{answer.told()} where a 400 was expected")
    if answer.status != 400:
        raise Warned(f"{answer.told()} where the standard has 400")
    if message and answer.message != message:
        raise Warned(f"{answer.told()} where the standard's words are {message!r}")
    return answer.told()


def denied(answer: Answer) -> str:
    """A 401 without body (tables 4, 6, 8).  Raises ``Failed``, ``Warned``."""
    if answer.status == 401:
        if answer.body:
            raise Warned(f"{answer.asked}: 401 with a body, where the standard has none")
        return f"{answer.asked}: 401 without body"
    if 400 <= answer.status < 500:
        raise Warned(f"{answer.told()} where the standard has 401")
    raise Failed(f"{answer.told()} where a 401 was expected")
