"""Clauses 5.2 and 6.1: Get status."""

from __future__ import annotations

from keysource.kme.conform.caller import Answer
from keysource.kme.conform.kit import Kit, check
from keysource.kme.conform.report import Failed, Warned

_STRINGS = ("source_KME_ID", "target_KME_ID", "master_SAE_ID", "slave_SAE_ID")
_NUMBERS = (
    "key_size",
    "stored_key_count",
    "max_key_count",
    "max_key_per_request",
    "max_key_size",
    "min_key_size",
    "max_SAE_ID_count",
)


async def _status(kit: Kit, encoded: str | None = None) -> Answer:
    answer = await kit.master.patiently("GET", kit.slave.sae, "status", encoded=encoded)
    if answer.status != 200:
        raise Failed(f"{answer.told()}: may {kit.master.sae!r} share with {kit.slave.sae!r} there?")
    return answer


@check("5.2", "GET .../{slave_SAE_ID}/status answers 200 with a Status in JSON.")
async def status_answers(kit: Kit) -> str:
    answer = await _status(kit)
    kit.status = answer.object()
    if not answer.content_type.lower().startswith("application/json"):
        raise Failed(f"Content-Type is {answer.content_type[:60]!r}")
    return "200, application/json"


@check("6.1", "A Status has all its mandatory fields, with their types.")
async def status_has_every_field(kit: Kit) -> str:
    fields = (await _status(kit)).object()
    wrong = [name for name in _STRINGS if not isinstance(fields.get(name), str)]
    wrong += [n for n in _NUMBERS if not isinstance(fields.get(n), int) or isinstance(fields.get(n), bool)]
    if wrong:
        raise Failed(f"missing or of a wrong type: {', '.join(wrong)}")
    extension = fields.get("status_extension", {})
    if extension is None:
        raise Warned("status_extension is null rather than absent")
    if not isinstance(extension, dict):
        raise Failed("status_extension is not an object")
    return f"{len(_STRINGS) + len(_NUMBERS)} fields"


@check("6.1", "master_SAE_ID is the SAE that calls, slave_SAE_ID the one of the path.")
async def status_names_both_saes(kit: Kit) -> str:
    fields = (await _status(kit)).object()
    said = fields.get("master_SAE_ID"), fields.get("slave_SAE_ID")
    if said != (kit.master.sae, kit.slave.sae):
        raise Failed(f"it says {said[0]!r} and {said[1]!r}, not {kit.master.sae!r} and {kit.slave.sae!r}"[:200])
    return "both are right"


@check("6.1", "The numbers of a Status fit together.")
async def status_is_consistent(kit: Kit) -> str:
    fields = (await _status(kit)).object()
    number = {name: fields[name] for name in _NUMBERS if isinstance(fields.get(name), int)}
    if len(number) < len(_NUMBERS):
        raise Failed("some are missing")
    if min(number.values()) < 0:
        raise Failed("a number is negative")
    if not 0 < number["min_key_size"] <= number["key_size"] <= number["max_key_size"]:
        raise Failed("key_size does not lie between min_key_size and max_key_size")
    if number["max_key_per_request"] < 1:
        raise Failed("max_key_per_request is 0")
    if number["stored_key_count"] > number["max_key_count"]:
        raise Warned("stored_key_count is above max_key_count")
    return f"keys of {number['min_key_size']} to {number['max_key_size']} bits, {number['stored_key_count']} stored"


@check("5.2", "Asking for the status takes no key.")
async def status_takes_nothing(kit: Kit) -> str:
    told = [(await _status(kit)).object().get("stored_key_count") for _ in range(4)]
    counts = [count for count in told if isinstance(count, int)]
    if len(counts) < len(told):
        raise Failed("stored_key_count is no number")
    if counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts):
        raise Failed(f"each status costs a key: {counts}")
    return f"{counts[0]} keys before, {counts[-1]} after"


@check("5", "SAE IDs of the path are URL-encoded, so an encoded one means the same.")
async def sae_ids_are_url_decoded(kit: Kit) -> str:
    encoded = "".join(f"%{byte:02X}" for byte in kit.slave.sae.encode())
    fields = (await _status(kit, encoded)).object()
    if fields.get("slave_SAE_ID") != kit.slave.sae:
        raise Failed(f"slave_SAE_ID of {encoded[:60]} is {str(fields.get('slave_SAE_ID'))[:60]!r}")
    return "percent-encoded, letter by letter, it is the same SAE"


@check("5.2, table 4", "An SAE that the KME does not know gets no status.")
async def an_unknown_slave_has_no_status(kit: Kit) -> str:
    answer = await kit.master.call("GET", "no-such-sae-of-qvpn-conform", "status")
    if answer.status == 200:
        raise Warned("200 for a slave that nobody has ever heard of")
    if answer.status not in (400, 401, 503):
        raise Warned(f"{answer.told()} where the standard has 400, 401 and 503 only")
    return answer.told()
