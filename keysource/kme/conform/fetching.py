"""Clauses 5.4 and 6.4: Get key with key IDs, as the slave SAE; at the end clause 6.5, for all answers there were."""

from __future__ import annotations

import asyncio
import json
import uuid

from keysource.etsi014 import messages
from keysource.kme.conform.caller import Answer, Caller
from keysource.kme.conform.kit import Kit, check, denied, keys_of, refused
from keysource.kme.conform.report import Failed, Warned


def _same(kit: Kit, answer: Answer, drawn: dict[str, bytes]) -> None:
    """The slave has what the master has.  Raises ``Failed``."""
    if answer.status != 200:
        raise Failed(answer.told())
    size = 8 * len(next(iter(drawn.values())))
    fetched = {uuid.UUID(key_id): key for key_id, key in keys_of(answer, size).items()}
    if set(fetched) != {uuid.UUID(key_id) for key_id in drawn}:
        raise Failed(f"{answer.asked}: other key_IDs came than were asked for")
    if any(fetched[uuid.UUID(key_id)] != key for key_id, key in drawn.items()):
        raise Failed(f"{answer.asked}: the slave's bytes are not the master's")


@check("5.4", "POST dec_keys gives the slave the master's keys, under the same key_IDs.")
async def the_slave_gets_the_same_keys(kit: Kit) -> str:
    drawn = await kit.draw(number=3)
    _same(kit, await kit.fetch(list(drawn)), drawn)
    return "3 keys, equal"


@check("5.4", "GET dec_keys?key_ID= gives one key.")
async def get_fetches_one_key(kit: Kit) -> str:
    drawn = await kit.draw()
    [key_id] = drawn
    _same(kit, await kit.slave.patiently("GET", kit.master.sae, "dec_keys", query=f"key_ID={key_id}"), drawn)
    return "one key, equal"


@check("5.4", "Keys that were fetched leave the pool: the second time they are not found.")
async def a_key_is_fetched_once(kit: Kit) -> str:
    drawn = await kit.draw()
    _same(kit, await kit.fetch(list(drawn)), drawn)
    again = await kit.fetch(list(drawn))
    if again.status == 200:
        raise Failed("the same key came twice")
    return refused(again, messages.KEYS_NOT_FOUND)


@check("5.4", "Of many that ask for one key at once, one gets it.")
async def a_race_has_one_winner(kit: Kit) -> str:
    drawn = await kit.draw()
    answers = await asyncio.gather(*(kit.fetch(list(drawn)) for _ in range(8)))
    if (won := sum(answer.status == 200 for answer in answers)) != 1:
        raise Failed(f"{won} of 8 got the key")
    return "1 of 8"


@check("5.4, table 8", "One key_ID that is not there fails the whole request; the other keys are not lost by it.")
async def one_unknown_key_id_fails_all(kit: Kit) -> str:
    drawn = await kit.draw(number=2)
    answer = await kit.fetch([*drawn, str(uuid.uuid4())])
    if answer.status == 200:
        raise Failed("a part was delivered")
    said = refused(answer, messages.KEYS_NOT_FOUND)
    rest = await kit.fetch(list(drawn))
    if rest.status != 200:
        raise Warned(f"the good ones are gone after it: {rest.told()}")
    _same(kit, rest, drawn)
    return f"{said}; afterwards the others came"


@check("5.4, table 8", "A key_ID that nobody was given is not found, in the standard's words.")
async def an_unknown_key_id_is_not_found(kit: Kit) -> str:
    return refused(await kit.fetch([str(uuid.uuid4())]), messages.KEYS_NOT_FOUND)


@check("6.4", "What is no UUID, and an empty list, is refused with 400.")
async def wrong_key_ids_are_refused(kit: Kit) -> str:
    body = {"key_IDs": [{"key_ID": 7}]}
    for answer in (
        await kit.fetch(["not a uuid"]),
        await kit.fetch([]),
        await kit.slave.patiently("POST", kit.master.sae, "dec_keys", body=body),
        await kit.slave.patiently("POST", kit.master.sae, "dec_keys", body={}),
        await kit.slave.patiently("POST", kit.master.sae, "dec_keys", raw=b"{"),
    ):
        said = refused(answer)
    return said


@check("5.4", "A GET carries exactly one key_ID.")
async def a_get_with_two_key_ids_is_refused(kit: Kit) -> str:
    first, second = await kit.draw(number=2)
    query = f"key_ID={first}&key_ID={second}"
    answer = await kit.slave.patiently("GET", kit.master.sae, "dec_keys", query=query)
    if answer.status == 200:
        raise Warned(f"200 with {len(answer.object().get('keys', []))} of the two keys")
    return refused(answer)


@check("6.4", "A key_ID is a UUID, in whatever case it is written.")
async def a_key_id_in_upper_case_is_the_same(kit: Kit) -> str:
    drawn = await kit.draw()
    answer = await kit.fetch([key_id.upper() for key_id in drawn])
    if answer.status != 200:
        raise Warned(f"{answer.told()} for a key_ID in upper case")
    _same(kit, answer, drawn)
    return "the same key"


@check("5.4", "Whoever is not a slave of these keys gets 401, and the keys stay for their slave.")
async def a_bystander_gets_nothing(kit: Kit) -> str:
    drawn = await kit.draw()
    other = Caller(kit.slave.url, kit.master.sae, kit.master.make_context, kit.notebook)
    body = {"key_IDs": [{"key_ID": key_id} for key_id in drawn]}
    try:  # the master itself, at the slave's KME
        answer = await other.patiently("POST", kit.master.sae, "dec_keys", body=body)
    finally:
        await other.aclose()
    if answer.status == 200:
        raise Failed("the keys went to an SAE that is not their slave")
    left = await kit.fetch(list(drawn))
    if left.status != 200:
        raise Failed(f"afterwards their slave does not get them: {left.told()}")
    _same(kit, left, drawn)
    return denied(answer) + "; their slave has them"


@check("5.4", "Keys of one master are not given out under another master's name.")
async def another_masters_name_gets_nothing(kit: Kit) -> str:
    drawn = await kit.draw()
    body = {"key_IDs": [{"key_ID": key_id} for key_id in drawn]}
    answer = await kit.slave.patiently("POST", "no-such-sae-of-qvpn-conform", "dec_keys", body=body)
    if answer.status == 200:
        raise Warned("200, though the path names another master")
    left = await kit.fetch(list(drawn))
    if left.status != 200:
        raise Failed(f"afterwards the right request fails: {left.told()}")
    _same(kit, left, drawn)
    return answer.told()


@check("6.2, annex B", "A key for an additional slave is for that SAE as well.")
async def an_additional_slave_is_served(kit: Kit) -> str:
    if not kit.status.get("max_SAE_ID_count"):
        return "max_SAE_ID_count is 0: no multicast, which a KME need not have"
    fields = {"additional_slave_SAE_IDs": [kit.slave.sae]}
    answer = await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body=fields)
    if answer.status == 200:  # the same SAE twice: it must be one key all the same
        drawn = kit.note(keys_of(answer, kit.key_size))
        _same(kit, await kit.fetch(list(drawn)), drawn)
        return "an SAE named twice gets its key once"
    return refused(answer)


@check("5, tables 4, 6, 8", "Statuses are 200, 400, 401 and 503 and no others; nothing is redirected.")
async def statuses_are_those_of_the_standard(kit: Kit) -> str:
    seen = sorted({answer.status for answer in kit.notebook.answers})
    if any(300 <= status < 400 for status in seen):
        raise Failed(f"a redirect, which an SAE must not follow: {seen}")
    if others := [status for status in seen if status not in (200, 400, 401, 503)]:
        raise Warned(f"also {others}")
    return f"{len(kit.notebook.answers)} answers: {seen}"


@check("6.5", "Every 400 and 503 has an Error with a message; details are an array of objects.")
async def errors_are_errors(kit: Kit) -> str:
    wrong = {answer.asked: answer.status for answer in kit.notebook.answers if not _is_an_error(answer)}
    if wrong:
        raise Failed("no Error in " + ", ".join(f"the {status} to {asked}" for asked, status in wrong.items())[:180])
    count = sum(answer.status in (400, 503) for answer in kit.notebook.answers)
    return f"{count} errors, each with its message"


def _is_an_error(answer: Answer) -> bool:
    """True also of what need not be one."""
    if answer.status not in (400, 503):
        return True
    try:
        fields = json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(fields, dict) or not isinstance(fields.get("message"), str):
        return False
    details = fields.get("details", [])
    return isinstance(details, list) and all(isinstance(pair, dict) for pair in details)
