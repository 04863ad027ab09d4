"""Clauses 5.3, 6.2 and 6.3: Get key, as the master SAE."""

from __future__ import annotations

import asyncio
from typing import Any

from keysource.etsi014 import messages
from keysource.kme.conform.kit import Kit, check, keys_of, refused
from keysource.kme.conform.report import Failed, Skipped, Warned

VENDOR = "qvpnconform_no_such_parameter"
_WRONG: tuple[dict[str, Any], ...] = (
    {"number": "1"},
    {"number": 1.5},
    {"size": "256"},
    {"size": True},
    {"additional_slave_SAE_IDs": "sae"},
    {"extension_mandatory": {"a": 1}},
)


async def _get(kit: Kit, query: str = "") -> dict[str, bytes]:
    answer = await kit.master.patiently("GET", kit.slave.sae, "enc_keys", query=query)
    if answer.status != 200:
        raise Failed(answer.told())
    return kit.note(keys_of(answer, kit.key_size))


async def _post(kit: Kit, **fields: Any) -> dict[str, bytes]:
    answer = await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body=fields)
    if answer.status != 200:
        raise Failed(answer.told())
    return kit.note(keys_of(answer, fields.get("size", kit.key_size)))


async def _refused(kit: Kit, fields: dict[str, Any], message: str = "") -> str:
    return refused(await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body=fields), message)


@check("5.3", "GET enc_keys without a query gives one key of the default size.")
async def get_gives_one_key(kit: Kit) -> str:
    keys = await _get(kit)
    if len(keys) != 1:
        raise Failed(f"{len(keys)} keys")
    return f"one key of {kit.key_size} bits"


@check("5.3", "GET enc_keys takes number and size as a query.")
async def get_takes_number_and_size(kit: Kit) -> str:
    keys = await _get(kit, f"number=2&size={kit.key_size}")
    if len(keys) != 2:
        raise Failed(f"{len(keys)} keys where 2 were asked for")
    return "2 keys"


@check("5.3, 6.2", "POST enc_keys with an empty Key request gives one key of the default size.")
async def post_of_an_empty_request_gives_one_key(kit: Kit) -> str:
    keys = await _post(kit)
    if len(keys) != 1:
        raise Failed(f"{len(keys)} keys")
    return "one key"


@check("6.2, 6.3", "POST enc_keys gives number keys of size bits, in base64, each under a UUID.")
async def post_takes_number_and_size(kit: Kit) -> str:
    keys = await _post(kit, number=3, size=kit.key_size)
    if len(keys) != 3:
        raise Failed(f"{len(keys)} keys where 3 were asked for")
    return f"3 keys of {kit.key_size} bits"


@check("6.2", "Every multiple of 8 from min_key_size to max_key_size is a size; its keys have it.")
async def sizes_between_the_bounds_are_served(kit: Kit) -> str:
    low, high = kit.status.get("min_key_size"), kit.status.get("max_key_size")
    if not isinstance(low, int) or not isinstance(high, int):
        raise Skipped("the status does not say the bounds")
    wanted = [size for size in sorted({low, low + 8, 512, high}) if low <= size <= min(high, 65_536) and not size % 8]
    for size in wanted:
        await _post(kit, size=size)
    return f"sizes {', '.join(map(str, wanted))}"


@check("6.2", "A size that is no multiple of 8 is refused in the standard's words, or served to the bit.")
async def an_odd_size_is_refused(kit: Kit) -> str:
    answer = await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body={"size": kit.key_size + 1})
    if answer.status == 200:
        kit.note(keys_of(answer, kit.key_size + 1))
        return f"a key of {kit.key_size + 1} bits"
    high = kit.status.get("max_key_size")
    if isinstance(high, int) and high < kit.key_size + 1:
        return refused(answer) + f" (max_key_size is {high})"
    return refused(answer, messages.SIZE_NOT_MULTIPLE)


@check("6.1, 6.2", "A size above max_key_size or below min_key_size is refused with 400.")
async def a_size_out_of_bounds_is_refused(kit: Kit) -> str:
    low, high = kit.status.get("min_key_size"), kit.status.get("max_key_size")
    if not isinstance(low, int) or not isinstance(high, int):
        raise Skipped("the status does not say the bounds")
    said = await _refused(kit, {"size": (high // 8 + 1) * 8})
    if low > 8:
        await _refused(kit, {"size": (low - 1) // 8 * 8})
    return said


@check("6.1, 6.2", "More keys than max_key_per_request are refused with 400.")
async def too_many_keys_are_refused(kit: Kit) -> str:
    most = kit.status.get("max_key_per_request")
    if not isinstance(most, int):
        raise Skipped("the status does not say max_key_per_request")
    return await _refused(kit, {"number": most + 1})


@check("6.2", "A number of 0 or less is refused with 400.")
async def no_keys_at_all_are_refused(kit: Kit) -> str:
    await _refused(kit, {"number": -1})
    return await _refused(kit, {"number": 0})


@check("6.2, table 6", "A Key request whose fields have other types is refused with 400.")
async def wrong_types_are_refused(kit: Kit) -> str:
    taken = []
    for fields in _WRONG:
        answer = await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body=fields)
        if answer.status == 200:
            taken.append(str(fields))
        else:
            refused(answer)
    if taken:
        raise Warned(f"accepted: {'; '.join(taken)}")
    return f"{len(_WRONG)} of them, each 400"


@check("5.3, table 6", "A body that is no JSON object is refused with 400.")
async def what_is_no_json_is_refused(kit: Kit) -> str:
    for raw in (b"{", b"[]", b"\xff\xfe", b'"text"'):
        said = refused(await kit.master.patiently("POST", kit.slave.sae, "enc_keys", raw=raw))
    return said


@check("6.2", "A parameter of extension_mandatory that the KME does not support is refused in the standard's words.")
async def an_unknown_mandatory_extension_is_refused(kit: Kit) -> str:
    return await _refused(kit, {"extension_mandatory": [{VENDOR: 1}]}, messages.MANDATORY_UNSUPPORTED)


@check("6.2", "A parameter of extension_optional that the KME does not support is ignored or refused in words.")
async def an_unknown_optional_extension_may_be_ignored(kit: Kit) -> str:
    fields = {"extension_optional": [{VENDOR: 1}]}
    answer = await kit.master.patiently("POST", kit.slave.sae, "enc_keys", body=fields)
    if answer.status == 200:
        kit.note(keys_of(answer, kit.key_size))
        return "ignored"
    return refused(answer, messages.OPTIONAL_UNHANDLED)


@check("5.3", "A GET carries number and size only; all else needs a POST.")
async def a_get_with_more_is_refused(kit: Kit) -> str:
    answer = await kit.master.patiently("GET", kit.slave.sae, "enc_keys", query="additional_slave_SAE_IDs=x")
    if answer.status == 200:
        kit.note(keys_of(answer, kit.key_size))
        raise Warned("additional_slave_SAE_IDs in a query is ignored: that SAE would never get its key")
    return refused(answer)


@check("6.1, 6.2", "More additional_slave_SAE_IDs than max_SAE_ID_count are refused with 400.")
async def too_many_slaves_are_refused(kit: Kit) -> str:
    most = kit.status.get("max_SAE_ID_count")
    if not isinstance(most, int) or not 0 <= most <= 1000:
        raise Skipped("the status does not say max_SAE_ID_count, or it is very large")
    return await _refused(kit, {"additional_slave_SAE_IDs": [f"sae-of-nobody-{i}" for i in range(most + 1)]})


@check("5.3", "Keys for an SAE that the KME does not know are refused.")
async def an_unknown_slave_gets_no_keys(kit: Kit) -> str:
    answer = await kit.master.patiently("POST", "no-such-sae-of-qvpn-conform", "enc_keys", body={})
    if answer.status == 401:
        return answer.told()
    return refused(answer)


@check("5.3", "A key that was handed to the master leaves the pool: no two draws have one in common.")
async def draws_at_once_share_nothing(kit: Kit) -> str:
    drawn = await asyncio.gather(*(_post(kit, number=2) for _ in range(8)))
    if (count := len({key_id for keys in drawn for key_id in keys})) != 16:
        raise Failed(f"{count} key_IDs where 16 were asked for")
    return "8 draws at once, 16 keys, all different"
