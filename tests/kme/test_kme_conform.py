"""``qvpn-kme conform``: our own KME passes whole; a KME with one mistake fails at that clause and nowhere else."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import uuid

import pytest
import pytest_asyncio
from aiohttp import web

from keysource import tls
from keysource.etsi014 import messages
from keysource.kme.conform.caller import Caller, Notebook
from keysource.kme.conform.kit import Kit, every_check, examine
from keysource.kme.conform.report import Outcome, as_json, as_markdown, conforms
from keysource.kme.pki import Authority
from tests.kme.conftest import ROOT
from tests.ports import free_port

ME, OTHER = "sae-alice", "sae-bob"


def contexts(authority, name):
    own = authority.sae(name)
    return lambda: tls.client_context(authority.certificate, own.certificate, own.private_key)


def a_kit(authority, url, slave_url):
    notebook = Notebook()
    master = Caller(url, ME, contexts(authority, ME), notebook)
    slave = Caller(slave_url, OTHER, contexts(authority, OTHER), notebook)
    return Kit(master, slave, authority.certificate, notebook)


async def verdicts_of(kit):
    try:
        return await examine(kit)
    finally:
        await kit.master.aclose()
        await kit.slave.aclose()


# Ours


@pytest.mark.asyncio(loop_scope="module")
async def test_our_kme_passes_every_check(shared_lab):
    plans = shared_lab.plans
    found = await verdicts_of(a_kit(shared_lab.authority, plans["alice"].url, plans["bob"].url))
    assert {v.name: v.found for v in found if v.outcome not in (Outcome.PASS, Outcome.SKIP)} == {}
    skipped = {v.name for v in found if v.outcome is Outcome.SKIP}
    assert skipped <= {"old-tls-is-refused"}  # where OpenSSL cannot even offer it
    assert len(found) == len(every_check()) >= 38
    report = as_markdown("our KME", found)
    assert report.count("\n| ") == len(found) + 1
    assert all(verdict.clause in report for verdict in found)
    assert json.loads(as_json("our KME", found))["conforms"] is True


@pytest.mark.asyncio(loop_scope="module")
async def test_the_command_examines_two_kmes_and_writes_a_report(shared_lab, tmp_path):
    lab = shared_lab
    pki = {site: lab.folder / site / "pki" for site in ("alice", "bob")}
    command = [
        sys.executable, "-m", "keysource.kme.cli", "conform", lab.plans["alice"].url,
        "--slave-url", lab.plans["bob"].url, "--ca", pki["alice"] / "ca.crt",
        "--master", ME, "--master-cert", pki["alice"] / f"{ME}.crt", "--master-key", pki["alice"] / f"{ME}.key",
        "--slave", OTHER, "--slave-cert", pki["bob"] / f"{OTHER}.crt", "--slave-key", pki["bob"] / f"{OTHER}.key",
        "--report", tmp_path / "report.md",
    ]  # fmt: skip
    code, out, err = await run(*command)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("conforms to ETSI GS QKD 014 V1.1.1: ")
    assert "| 5.4 | " in (tmp_path / "report.md").read_text()
    code, out, err = await run(*command[:-2], "--ca", tmp_path / "nothing.crt")
    assert (code, out, err) == (2, "", f"qvpn-kme: {tmp_path}/nothing.crt: No such file or directory\n")


async def run(*command):
    process = await asyncio.create_subprocess_exec(
        *map(os.fspath, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_wrong_usage_is_one_sentence():
    for arguments in ([], ["https://localhost:1"], ["https://localhost:1", "--sae", "x"]):
        code, out, err = await run(sys.executable, "-m", "keysource.kme.cli", "conform", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("qvpn-kme: ") and err.count("\n") == 1


# Others: a small KME that is right but for one thing


class SmallKme:
    """Everything in memory, one process for both SAEs; ``mistake`` is the one thing that it does wrong."""

    def __init__(self, authority, mistake=""):
        self.mistake = mistake
        own = authority.kme("kme-small", ["127.0.0.1"])
        self._context = tls.server_context(authority.certificate, own.certificate, own.private_key)
        self._keys = {}

    async def start(self):
        application = web.Application(client_max_size=10**6)
        path = "/api/v1/keys/{sae}/"
        application.router.add_get(path + "status", self.status)
        for method in ("GET", "POST"):
            application.router.add_route(method, path + "enc_keys", self.enc_keys)
            application.router.add_route(method, path + "dec_keys", self.dec_keys)
        self.runner = web.AppRunner(application, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0, ssl_context=self._context).start()
        self.url = f"https://127.0.0.1:{self.runner.addresses[0][1]}"

    def is_(self, mistake):
        return self.mistake == mistake

    def error(self, message, status=400, **more):
        field = "detail" if self.is_("detail") else "message"
        return web.json_response({field: message, **more}, status=status)

    @staticmethod
    def caller(request):
        certificate = request.get_extra_info("ssl_object").getpeercert()
        return certificate["subject"][0][0][1]

    async def status(self, request):
        sae = request.match_info["sae"]
        if sae not in (ME, OTHER) and not self.is_("any-slave"):
            return self.error("unknown SAE")
        fields = {
            "source_KME_ID": "kme-small", "target_KME_ID": "kme-small", "master_SAE_ID": self.caller(request),
            "slave_SAE_ID": sae, "key_size": 256, "stored_key_count": 500, "max_key_count": 1000,
            "max_key_per_request": 16, "max_key_size": 1024, "min_key_size": 64, "max_SAE_ID_count": 0,
        }  # fmt: skip
        if self.is_("no-count"):
            del fields["stored_key_count"]
        if self.is_("swapped"):
            fields |= {"master_SAE_ID": sae, "slave_SAE_ID": self.caller(request)}
        return web.json_response(fields)

    async def enc_keys(self, request):
        sae = request.match_info["sae"]
        if sae not in (ME, OTHER):
            return self.error("unknown SAE")
        if request.method == "GET":
            if set(request.query) - {"number", "size"}:
                return self.error("a GET takes number and size")
            asked = messages.KeyRequest(**{name: int(value) for name, value in request.query.items()})
        else:
            try:
                asked = messages.request_untrusted(await request.read())
            except ValueError as error:
                return self.error(str(error))
        size = asked.size or 256
        if self.is_("ignores-size"):
            size = 256
        if refusal := self.refusal(asked, size):
            return refusal
        keys = []
        for _ in range(asked.number):
            key_id, key = str(uuid.uuid4()), os.urandom(size // 8)
            if self.is_("one-key") and size >= 128:
                key = bytes(size // 8)
            self._keys[key_id] = (self.caller(request), sae, base64.b64encode(key).decode())
            keys.append({"key_ID": key_id, "key": self._keys[key_id][2]})
        return web.json_response({"keys": keys})

    def refusal(self, asked, size):
        if size % 8:
            return self.error("no" if self.is_("own-words") else messages.SIZE_NOT_MULTIPLE)
        if not 64 <= size <= 1024 or not 1 <= asked.number <= 16 or asked.additional_slave_SAE_IDs:
            return None if self.is_("no-bounds") and asked.number > 16 else self.error("out of bounds")
        if asked.extension_mandatory and not self.is_("ignores-mandatory"):
            return self.error(messages.MANDATORY_UNSUPPORTED)
        return None

    async def dec_keys(self, request):
        sae, master = self.caller(request), request.match_info["sae"]
        try:
            if request.method == "GET":
                [key_id] = request.query.getall("key_ID")
                key_ids = [key_id]
            else:
                key_ids = [entry.key_ID for entry in messages.key_ids_untrusted(await request.read()).key_IDs]
            key_ids = [str(uuid.UUID(key_id)) for key_id in key_ids]
        except (ValueError, KeyError) as error:
            return self.error(str(error))
        known = [key_id for key_id in key_ids if key_id in self._keys]
        if self.is_("parts") and known:
            key_ids = known
        if not key_ids or len(known) != len(key_ids):
            status = 404 if self.is_("404") else 400
            return self.error(messages.KEYS_NOT_FOUND, status)
        entries = [(key_id, self._keys[key_id]) for key_id in key_ids]
        if any(key[1] != sae for _id, key in entries) and not self.is_("to-anybody"):
            return web.Response(status=401)
        if any(key[0] != master for _id, key in entries):
            return self.error(messages.KEYS_NOT_FOUND)
        if not self.is_("never-forgets"):
            for key_id in key_ids:
                del self._keys[key_id]
        if self.is_("wrong-bytes"):
            entries = [(key_id, (key[0], key[1], base64.b64encode(bytes(32)).decode())) for key_id, key in entries]
        return web.json_response({"keys": [{"key_ID": key_id, "key": key[2]} for key_id, key in entries]})


@pytest_asyncio.fixture
async def small():
    running, authority = [], Authority("small CA")

    async def start(mistake):
        kme = SmallKme(authority, mistake)
        await kme.start()
        running.append(kme)
        return {v.name: v for v in await verdicts_of(a_kit(authority, kme.url, kme.url))}

    yield start
    for kme in running:
        await kme.runner.cleanup()


async def test_a_small_kme_without_a_mistake_passes(small):
    found = await small("")
    assert {name: v.found for name, v in found.items() if v.outcome in (Outcome.FAIL, Outcome.WARN)} == {}


MISTAKES = {
    "no-count": {"status-has-every-field", "status-is-consistent", "status-takes-nothing"},
    "swapped": {"status-names-both-saes", "sae-ids-are-url-decoded"},
    "ignores-size": {
        "sizes-between-the-bounds-are-served",
        "a-size-out-of-bounds-is-refused",
        "an-odd-size-is-refused",
    },
    "no-bounds": {"too-many-keys-are-refused"},
    "ignores-mandatory": {"an-unknown-mandatory-extension-is-refused"},
    "one-key": None,
    "parts": {"one-unknown-key-id-fails-all"},
    "to-anybody": {"a-bystander-gets-nothing"},
    "never-forgets": {"a-key-is-fetched-once", "a-race-has-one-winner"},
    "detail": {"errors-are-errors"},
    "wrong-bytes": None,
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_one_mistake_fails_at_its_clause(small, mistake):
    found = await small(mistake)
    failed = {name for name, v in found.items() if v.outcome is Outcome.FAIL}
    assert not conforms(list(found.values()))
    if MISTAKES[mistake] is not None:
        assert failed == MISTAKES[mistake]
    elif mistake == "one-key":
        assert "the same bytes were given out under two key_IDs" in {v.found for v in found.values()}
    else:
        assert "the-slave-gets-the-same-keys" in failed and "get-gives-one-key" not in failed


@pytest.mark.parametrize(
    ("mistake", "warned"),
    [
        ("own-words", {"an-odd-size-is-refused"}),
        ("any-slave", {"an-unknown-slave-has-no-status"}),
        ("404", None),
    ],
)
async def test_what_the_standard_leaves_open_is_a_warning(small, mistake, warned):
    found = await small(mistake)
    assert conforms(list(found.values()))
    seen = {name for name, v in found.items() if v.outcome is Outcome.WARN}
    assert seen == warned if warned else {"a-key-is-fetched-once", "statuses-are-those-of-the-standard"} <= seen


async def test_a_kme_that_is_not_there_fails_with_a_sentence():
    kit = a_kit(Authority("nobody"), "https://127.0.0.1:1", "https://127.0.0.1:1")
    found = await verdicts_of(kit)
    assert [v.outcome for v in found] == [Outcome.FAIL] + [Outcome.SKIP] * (len(found) - 1)
    assert "refused" in found[0].found


async def test_a_server_of_an_afternoon_is_seen_through(tmp_path):
    """The yardstick of the load measurement: FastAPI's errors, keys for whoever asks, a status of four fields."""
    pytest.importorskip("uvicorn")
    authority = Authority("afternoon CA")
    authority.kme("kme-plain", ["127.0.0.1"]).write(tmp_path, "kme")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    port = free_port()
    files = [tmp_path / name for name in ("ca.crt", "kme.crt", "kme.key")]
    command = [sys.executable, ROOT / "tests/bench/plain_014_server.py", str(port), *files]
    server = await asyncio.create_subprocess_exec(*map(os.fspath, command), cwd=ROOT)
    try:
        await until_it_listens(port, server)
        url = f"https://127.0.0.1:{port}"
        found = {v.name: v.outcome for v in await verdicts_of(a_kit(authority, url, url))}
    finally:
        server.terminate()
        await server.wait()
    failed = {name for name, outcome in found.items() if outcome is Outcome.FAIL}
    assert failed >= {
        "status-has-every-field",
        "status-names-both-saes",
        "get-gives-one-key",
        "an-odd-size-is-refused",
        "an-unknown-mandatory-extension-is-refused",
        "a-bystander-gets-nothing",
    }
    right = {"tls-is-12-or-newer", "without-a-certificate-there-is-nothing", "the-slave-gets-the-same-keys"}
    assert {found[name] for name in right | {"a-key-is-fetched-once"}} == {Outcome.PASS}


async def until_it_listens(port, server):
    for _ in range(600):
        try:
            _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert server.returncode is None, "the server ended"
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return
    raise AssertionError("it does not listen")
