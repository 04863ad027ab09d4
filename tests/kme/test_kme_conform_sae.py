"""``qvpn-kme conform --sae``: our own SAE passes every lesson; what an SAE can do wrong is seen and named."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import sys

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from yarl import URL

from keysource import tls
from keysource.base import SourceContext
from keysource.errors import KeySourceError
from keysource.etsi014.source import Etsi014Source
from keysource.kme.conform.report import Outcome
from keysource.kme.conform.rules import RULES, Book
from keysource.kme.conform.strict import ENC_LESSONS, StrictKme
from keysource.kme.conform.strictserve import prepare
from tests.kme.conftest import ROOT

ONE, TWO = "sae-one", "sae-two"


class School:
    """A strict KME on loopback, with its book."""

    def __init__(self, folder, *, lessons):
        self.folder, self.book, self.time = folder, Book(), 0.0
        self._kme = StrictKme((ONE, TWO), self.book, lambda: self.time, lessons=lessons)
        prepare(folder, (ONE, TWO), "127.0.0.1")

    async def start(self):
        files = [(self.folder / name).read_bytes() for name in ("ca.crt", "kme-strict.crt", "kme-strict.key")]
        self.runner = web.AppRunner(self._kme.application(), access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0, ssl_context=tls.server_context(*files)).start()
        self.url = f"https://127.0.0.1:{self.runner.addresses[0][1]}"

    async def ask(self, sae, method, path, body=None, **headers):
        """(status, JSON); (0, None) where the connection broke."""
        files = [(self.folder / name).read_bytes() for name in ("ca.crt", f"{sae}.crt", f"{sae}.key")]
        connector = aiohttp.TCPConnector(ssl=tls.client_context(*files))
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": headers.get("kind", "application/json")} if data is not None else {}
        try:
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.request(
                    method, URL(self.url + path, encoded=True), data=data, headers=headers, allow_redirects=False
                ) as answer,
            ):
                read = await answer.read()
                return answer.status, json.loads(read) if read and answer.status != 404 else None
        except (aiohttp.ClientError, ssl.SSLError, OSError):
            return 0, None

    async def draw(self, body=None):
        return await self.ask(ONE, "POST", f"/api/v1/keys/{TWO}/enc_keys", body or {})

    async def fetch(self, key_ids, sae=TWO):
        body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
        return await self.ask(sae, "POST", f"/api/v1/keys/{ONE}/dec_keys", body)

    def broken(self, sae):
        return {v.name for v in self.book.verdicts(sae) if v.outcome in (Outcome.FAIL, Outcome.WARN)}

    def kept(self, sae):
        return {v.name for v in self.book.verdicts(sae) if v.outcome is Outcome.PASS}


@pytest_asyncio.fixture
async def school(tmp_path):
    schools = []

    async def start(*, lessons=False):
        schools.append(School(tmp_path / str(len(schools)), lessons=lessons))
        await schools[-1].start()
        return schools[-1]

    yield start
    for one in schools:
        await one.runner.cleanup()


def ids(answer):
    return [key["key_ID"] for key in answer["keys"]]


async def test_our_own_sae_passes_every_lesson(school):
    """Both sides are our ``etsi014``; its short pauses run on the strict KME's clock."""
    strict = await school(lessons=True)
    sources = {}
    for sae, other in ((ONE, TWO), (TWO, ONE)):
        table = {"url": strict.url, "sae": sae, "ca": "ca.crt"}
        table |= {"certificate": f"{sae}.crt", "private_key": f"{sae}.key"}
        sources[sae] = Etsi014Source(table, SourceContext("strict", strict.folder, strict.folder, other))
        await sources[sae].start()

        async def sleep(seconds):
            strict.time += seconds

        sources[sae]._client._sleep = sleep
    drawn = 0
    for _ in range(4 * len(ENC_LESSONS)):
        strict.time += 10.0
        try:
            key = await sources[ONE].get_key(TWO)
            drawn += 1
            copy = await sources[TWO].get_key_with_id(ONE, key.key_id)
        except KeySourceError:
            continue  # a lesson: another key, another time
        assert copy.material == key.material
    for source in sources.values():
        await source.aclose()
    assert drawn > 20
    assert strict.broken(ONE) == strict.broken(TWO) == set()
    learnt = {"tls", "path", "body", "types", "fields", "bounds", "slave"}
    assert strict.kept(ONE) >= learnt | {"patience", "redirect", "length", "equal"}
    assert strict.kept(TWO) >= learnt - {"bounds"} | {"patience", "redirect", "own", "once", "lost"}


@pytest.mark.parametrize(
    ("method", "path", "body", "rule"),
    [
        ("GET", f"/api/v1/keys/{TWO}/enc_keys?additional_slave_SAE_IDs=x", None, "get"),
        ("GET", f"/api/v1/keys/{TWO}/enc_keys?number=1&number=2", None, "get"),
        ("GET", f"/api/v1/keys/{TWO}/dec_keys", None, "get"),
        ("GET", "/api/v1/keys/sae/two/status", None, "path"),
        ("DELETE", f"/api/v1/keys/{TWO}/enc_keys", None, "path"),
        ("GET", "/", None, "path"),
        ("GET", "/api/v1/keys/sae-three/status", None, "slave"),
        ("GET", f"/api/v1/keys/{ONE}/status", None, "slave"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", b"[]", "body"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", b"{", "body"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"number": "1"}, "types"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"size": None}, "types"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"sizes": 256}, "fields"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"size": 257}, "bounds"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"number": 9}, "bounds"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"additional_slave_SAE_IDs": ["x"]}, "bounds"),
        ("POST", f"/api/v1/keys/{TWO}/enc_keys", {"extension_optional": [{"route": 1}]}, "vendor"),
        ("POST", f"/api/v1/keys/{TWO}/dec_keys", {"key_IDs": [{"key_ID": "x"}]}, "types"),
        ("POST", f"/api/v1/keys/{TWO}/dec_keys", {"key_IDs": []}, "own"),
        ("POST", f"/api/v1/keys/{TWO}/dec_keys", {"key_IDs": [{"key_ID": "0" * 32, "master_SAE_ID": "m"}]}, "fields"),
    ],
)
async def test_a_wrong_request_is_noted(school, method, path, body, rule):
    strict = await school()
    status, _answer = await strict.ask(ONE, method, path, body)
    assert rule in strict.broken(ONE)
    assert (status == 200) is (rule in ("fields", "vendor") and "enc_keys" in path)
    [verdict] = [v for v in strict.book.verdicts(ONE) if v.name == rule]
    assert verdict.found and verdict.clause == RULES[rule].clause


async def test_a_body_of_another_type_is_noted_and_read(school):
    strict = await school()
    path = f"/api/v1/keys/{TWO}/enc_keys"
    assert (await strict.ask(ONE, "POST", path, b"{}", kind="text/plain"))[0] == 200
    assert strict.broken(ONE) == {"body"}


async def test_keys_of_others_and_keys_that_it_had(school):
    strict = await school()
    _status, answer = await strict.draw({"number": 2})
    first, second = ids(answer)
    assert (await strict.ask(ONE, "GET", f"/api/v1/keys/{TWO}/dec_keys?key_ID={first}"))[0] == 400
    assert strict.broken(ONE) == {"own"}  # a master has its keys already
    assert (await strict.fetch([first]))[0] == 200
    assert strict.broken(TWO) == set()
    assert (await strict.fetch([second, first]))[0] == 400
    assert strict.broken(TWO) == {"once"}
    assert (await strict.fetch([second]))[0] == 200


async def test_what_it_does_after_a_503(school):
    strict = await school(lessons=True)
    for early, broken in ((0.2, {"patience"}), (1.0, {"patience"})):
        for _ in range(len(ENC_LESSONS)):
            status, _answer = await strict.draw()
            if status == 503:
                strict.time += early
            else:
                strict.time += 5
        assert strict.broken(ONE) == broken
    other = await school(lessons=True)
    for _ in range(2 * len(ENC_LESSONS)):
        status, _answer = await other.draw()
        other.time += 1.0
    assert "patience" not in other.broken(ONE)
    assert "patience" in other.kept(ONE)


async def test_what_it_does_with_bad_keys_and_lost_answers(school):
    strict = await school(lessons=True)
    short, seen, lost = set(), {}, None
    for _ in range(len(ENC_LESSONS)):
        strict.time += 5
        status, answer = await strict.draw()
        if status != 200:
            continue
        [key] = answer["keys"]
        if len(key["key"]) < 30 or key["key"] in seen:
            short.add(key["key_ID"])
        seen[key["key"]] = key["key_ID"]
    assert len(short) == 2 and strict.broken(ONE) == set()
    for key_id in [*seen.values(), *short]:
        strict.time += 5
        status, _answer = await strict.fetch([key_id])
        if status == 0:
            lost = key_id
            assert strict.broken(TWO) == set()
    assert strict.broken(ONE) == {"length", "equal"}  # the master had told its slave to use them
    assert (await strict.fetch([lost]))[0] == 400
    assert "lost" in strict.broken(TWO)


async def test_a_redirect_that_is_followed(school):
    strict = await school(lessons=True)
    for _ in range(ENC_LESSONS.index("redirect") + 1):
        strict.time += 5
        status, _answer = await strict.draw()
    assert status == 307 and strict.broken(ONE) == set()
    await strict.ask(ONE, "POST", f"/elsewhere/api/v1/keys/{TWO}/enc_keys", {})
    assert strict.broken(ONE) == {"redirect"}


async def test_the_command_writes_what_came(tmp_path):
    report = tmp_path / "report.md"
    command = ["conform", "--sae", str(tmp_path / "pki"), "--listen", "127.0.0.1:0", "--report", str(report)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keysource.kme.cli", *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        line = (await process.stdout.readline()).decode()
        assert line.startswith("strict KME at https://127.0.0.1:")
        school = School.__new__(School)
        school.folder, school.url = tmp_path / "pki", line.split()[3].rstrip(",")
        assert (await school.draw({"number": 9}))[0] == 400
        process.send_signal(signal.SIGINT)
        out, _err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    assert "FAIL  6.1, 6.2  sae-one: 9 keys where max_key_per_request is 8" in out.decode()
    assert "| 6.1, 6.2 |" in report.read_text()
