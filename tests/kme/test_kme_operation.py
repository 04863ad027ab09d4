"""What an operator does with a KME: certificates and tables that change meanwhile, limits, audit, status, check."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import ssl
import tempfile
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from cryptography import x509
from typer.testing import CliRunner

from keysource import tls
from keysource.kme import checks, cli
from keysource.kme.audit import Audit, AuditError
from keysource.kme.auth import common_name, sae_reader, uri_name
from keysource.kme.config import load, needs_restart
from keysource.kme.pki import Authority
from keysource.kme.ratelimit import RateLimits, TokenBucket
from keysource.kme.scaffold import SitePlan, write_pair

runner = CliRunner()
loop = pytest.mark.asyncio(loop_scope="module")
STATUS = "/api/v1/keys/sae-bob/status"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder))
        try:
            await lab.start(keys=64)
            yield lab
        finally:
            await lab.aclose()


def reloads(lab, site):
    return [line for line in lab.log(site) if line["event"] == "reloaded"]


async def reloaded(lab, site, act):
    before = len(reloads(lab, site))
    act()
    await lab.until(lambda: len(reloads(lab, site)) > before, "the reload")


# Reload


def replace(path, content):
    """As a certificate tool does it: a new file takes the name."""
    mode = path.stat().st_mode & 0o777
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.chmod(mode)
    new.replace(path)


@loop
async def test_a_renewed_certificate_is_taken_up_without_a_signal(lab):
    port = lab.plans["alice"].port
    pki = lab.folder / "alice" / "pki"
    credential = lab.authority.sae("sae-alice")
    context = tls.client_context(lab.authority.certificate, credential.certificate, credential.private_key)

    async def serial():
        _reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
        writer.transport.abort()
        return shown

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        url = f"https://127.0.0.1:{port}{STATUS}"
        assert (await session.get(url)).status == 200
        before = await serial()
        new = lab.authority.kme("kme-alice", ["127.0.0.1"])

        def renew():
            replace(pki / "kme-alice.key", new.private_key)
            replace(pki / "kme-alice.crt", new.certificate)

        await reloaded(lab, "alice", renew)
        assert await serial() != before
        assert (await session.get(url)).status == 200  # over a connection that is new
    keys = (await lab.enc()).keys()  # and the other KME believes the new one as well
    assert (await lab.dec(list(keys))).keys() == keys


@loop
async def test_a_broken_certificate_changes_nothing(lab):
    path = lab.folder / "alice" / "pki" / "kme-alice.crt"
    good = path.read_bytes()
    replace(path, b"not a certificate")
    await lab.until(lambda: any(x["event"].startswith("nothing was reloaded") for x in lab.log("alice")), "refusal")
    assert (await lab.http("sae-alice", "alice", "GET", STATUS)).status == 200
    await reloaded(lab, "alice", lambda: replace(path, good))


@loop
async def test_a_handshake_that_outlasts_the_reload_opens_nothing(lab):
    """Begun while the authority was believed, ended after."""
    stranger = Authority("another CA")
    path = lab.folder / "alice" / "pki" / "ca.crt"
    both = lab.authority.certificate + stranger.certificate
    await reloaded(lab, "alice", lambda: replace(path, both))
    credential = stranger.sae("sae-alice")
    bad = tls.client_context(lab.authority.certificate, credential.certificate, credential.private_key)
    own = [(lab.folder / "alice" / "pki" / f"sae-alice.{end}").read_bytes() for end in ("crt", "key")]
    good = tls.client_context(lab.authority.certificate, *own)
    port = int(lab.plans["alice"].url.rpartition(":")[2])
    waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    await asyncio.sleep(0.2)  # both are accepted, with the certificates of now
    await reloaded(lab, "alice", lambda: replace(path, lab.authority.certificate))
    answers = []
    for (reader, writer), context in zip(waiting, (bad, good), strict=True):
        await writer.start_tls(context, server_hostname="127.0.0.1")
        writer.write(f"GET {STATUS} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answers.append(await asyncio.wait_for(reader.readline(), 10))
        writer.close()
    assert all(b" 503 " in answer for answer in answers)
    assert (await lab.http("sae-alice", "alice", "GET", STATUS)).status == 200


@loop
async def test_an_authority_that_is_believed_no_more_is_cut_off_at_once(lab):
    """Also on the connections that there are."""
    stranger = Authority("another CA")
    path = lab.folder / "alice" / "pki" / "ca.crt"
    both = lab.authority.certificate + stranger.certificate
    await reloaded(lab, "alice", lambda: replace(path, both))
    credential = stranger.sae("sae-alice")
    context = tls.client_context(lab.authority.certificate, credential.certificate, credential.private_key)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        url = f"{lab.plans['alice'].url}{STATUS}"
        assert (await session.get(url)).status == 200
        await reloaded(lab, "alice", lambda: replace(path, lab.authority.certificate))
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await session.get(url)
    assert (await lab.http("sae-alice", "alice", "GET", STATUS)).status == 200


@loop
async def test_sighup_takes_over_saes_and_limits_and_refuses_the_rest(lab):
    file = lab.files["alice"]
    text = file.read_text()
    assert (await lab.http("sae-new", "alice", "GET", STATUS)).status == 401

    def hangup(content):
        file.write_text(content)
        os.kill(lab.processes["alice"].pid, signal.SIGHUP)

    more = '\n[[sae]]\nid = "sae-new"\nmay_share_with = ["sae-bob"]\nrequests_per_second = 0.5\nburst = 2\n'
    await reloaded(lab, "alice", lambda: hangup(text + more))
    answers = [await lab.http("sae-new", "alice", "GET", STATUS) for _ in range(4)]
    assert [answer.status for answer in answers][:2] == [200, 200]
    slow = answers[-1]  # ETSI GS QKD 014 has 400, 401 and 503, and no 429
    assert (slow.status, slow.json["details"]) == (503, [{"qvpn_reason": "rate"}])
    assert int(slow.headers["Retry-After"]) >= 1
    assert (await lab.http("sae-alice", "alice", "GET", STATUS)).status == 200  # its own bucket
    refused = len(lab.log("alice"))
    hangup((text + more).replace('store = "kme-state/', 'store = "elsewhere/'))
    await lab.until(lambda: any("only certificates" in str(x) for x in lab.log("alice")[refused:]), "the refusal")
    hangup("nonsense")
    await lab.until(lambda: any("not TOML" in str(x) for x in lab.log("alice")[refused:]), "the refusal")
    await reloaded(lab, "alice", lambda: hangup(text))
    assert (await lab.http("sae-new", "alice", "GET", STATUS)).status == 401


@loop
async def test_an_sae_may_be_a_uri_of_the_certificate(lab):
    file, text = lab.files["alice"], lab.files["alice"].read_text()
    changed = text.replace("[kme]\n", '[kme]\nsae_id_from = "san-uri"\nsae_id_prefix = "urn:example:sae:"\n', 1)

    def hangup(content):
        file.write_text(content)
        os.kill(lab.processes["alice"].pid, signal.SIGHUP)

    await reloaded(lab, "alice", lambda: hangup(changed))
    uri = x509.UniformResourceIdentifier("urn:example:sae:sae-alice")
    named = lab.authority._issue(
        "any name", [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH], x509.SubjectAlternativeName([uri])
    )
    context = tls.client_context(lab.authority.certificate, named.certificate, named.private_key)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.get(f"{lab.plans['alice'].url}{STATUS}") as answer,
    ):
        assert (answer.status, (await answer.json())["master_SAE_ID"]) == (200, "sae-alice")
    assert (await lab.http("sae-alice", "alice", "GET", STATUS)).status == 401  # a common name is none now
    await reloaded(lab, "alice", lambda: hangup(text))


@loop
async def test_status_tells_what_an_operator_asks(lab):
    answer = lab.status("alice")
    [sae] = answer["saes"]
    assert sae["requests"] > 0
    assert sae["issued"] == answer["links"][0]["issued"]
    assert answer["epoch"] >= 1
    assert datetime.datetime.fromisoformat(answer["certificate_ends"]) > datetime.datetime.now(datetime.UTC)
    shown = runner.invoke(cli.app, ["status", str(lab.files["alice"])], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for part in ("sae-alice", "sae-bob", "kme-bob", "certificate ends", "audit.jsonl"):
        assert part in shown.output


@loop
async def test_check_online_asks_the_other_kme_for_its_name(lab, tmp_path):
    found = await checks.peers(lab.config("alice"))
    assert [(finding.fault, "answers with TLSv1.3" in finding.text) for finding in found] == [(False, True)]
    file = tmp_path / "kme.toml"
    text = lab.files["alice"].read_text().replace("kme-bob", "kme-carol")
    for name in ("pki/kme-alice.crt", "pki/kme-alice.key", "pki/ca.crt"):
        text = text.replace(f'"{name}"', f'"{lab.folder / "alice" / name}"')
    file.write_text(text)
    [finding] = await checks.peers(load(file))
    assert finding.fault
    assert "kme-carol" in finding.text
    lab.stop_kme("bob")
    [finding] = await checks.peers(lab.config("alice"))
    assert (finding.fault, "refused" in finding.text) == (True, True)


# Audit


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_follows_its_name(tmp_path):
    path = tmp_path / "log" / "audit.jsonl"
    audit = Audit(path, "kme")
    audit.open()
    assert path.stat().st_mode & 0o777 == 0o600
    audit.write("issued", ["some-key"], master="m")
    path.rename(path.with_name("audit.1"))
    audit.write("issued", ["other-key"], master="m")
    path.unlink()
    audit.write("fetched")
    assert [line["event"] for line in lines(path)] == ["fetched"]
    [first] = lines(path.with_name("audit.1"))
    assert len(first["keys"][0]) == 64
    assert "some-key" not in json.dumps(first)
    path.write_text("")  # copytruncate
    audit.write("fetched")
    assert len(lines(path)) == 1
    audit.close()


def test_the_audit_log_is_never_for_everybody(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, "kme-a")
    audit.write("one")
    assert path.stat().st_mode & 0o777 == 0o600
    for made, is_then in ((0o644, 0o640), (0o666, 0o640), (0o640, 0o640), (0o777, 0o640), (0o600, 0o600)):
        path.rename(tmp_path / "old")
        path.touch()
        path.chmod(made)  # as a rotation makes the new one
        audit.write("two")
        assert path.stat().st_mode & 0o777 == is_then
    audit.close()


def test_an_audit_log_that_cannot_be_written_says_so(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(AuditError):
        Audit(path, "kme").open()  # a link is not followed
    path.unlink()
    audit = Audit(path, "kme")
    audit.open()
    audit._file = os.open("/dev/full", os.O_WRONLY)
    audit._path = Path("/dev/full")
    with pytest.raises(AuditError, match="No space"):
        audit.write("issued")
    audit.close()


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, "kme")
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(AuditError, match="part of a line"):
            audit.write("issued")
    audit.write("fetched")
    cut, whole = path.read_text().splitlines()
    assert len(cut) == 10
    assert json.loads(whole)["event"] == "fetched"
    audit.close()


def test_many_refusals_are_counted_and_not_written(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, "kme")
    for _ in range(1000):
        audit.refused("stranger", 5.0, sae="x")
    assert len(lines(path)) == 100
    audit.refused("stranger", 6.0, sae="x")
    assert lines(path)[-1]["left_out"] == 900
    audit.close()


async def test_without_an_audit_log_nothing_is_handed_out(make_lab):
    lab = make_lab()
    lab.files["alice"].write_text(
        lab.files["alice"].read_text().replace("[kme]\n", '[kme]\naudit = "log/a.jsonl"\n', 1)
    )
    await lab.start(keys=8)
    before = lab.link("alice")["own_free"]
    folder = lab.folder / "alice" / "log"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    answer = await lab.enc()
    assert (answer.status, answer.message) == (503, "the audit log cannot be written")
    assert lab.link("alice")["own_free"] == before
    folder.unlink()
    assert (await lab.enc()).status == 200


# Who is who, how often


def test_names_of_a_certificate():
    both = {
        "subject": ((("commonName", "a"),),),
        "subjectAltName": (("DNS", "d"), ("URI", "urn:x:1"), ("URI", "y:2")),
    }
    assert common_name(both) == "a"
    assert uri_name(both, "urn:x:") == "1"
    assert uri_name(both, "") is None  # two
    assert uri_name(both, "urn:z:") is None
    assert uri_name({"subjectAltName": (("URI", "urn:x:"),)}, "urn:x:") is None
    assert uri_name(None, "") is None
    assert sae_reader("san-uri", "y:")(both) == "2"
    assert sae_reader("cn", "")(both) == "a"
    assert common_name({"subject": ((("commonName", "a"),), (("commonName", "b"),))}) is None


def test_a_bucket_fills_with_time_and_never_above_its_burst():
    bucket = TokenBucket(2.0, 4.0)
    assert [bucket.wait(100.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert bucket.wait(100.25) == 0.25
    assert bucket.wait(100.5) == 0
    assert [bucket.wait(1000.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert bucket.wait(999.0) == 0.5  # a clock that goes back gives nothing
    large = TokenBucket(2.0, 4.0)
    assert large.wait(1.0, 100) == 0  # more than it can ever hold: the rest is owed
    assert large.wait(1.0) == 97 / 2
    assert TokenBucket(0.0, 1.0).wait(1.0, 1e9) == 0


def test_an_sae_has_its_own_limits(tmp_path):
    [file, _] = write_pair(tmp_path, SitePlan("alice", "h1"), SitePlan("bob", "h2"))
    file.write_text(
        file.read_text() + "keys_per_second = 2.0\n[[sae]]\nid = 'b'\n[limits]\nrequests_per_second = 1\nburst = 1\n"
        "max_key_per_request = 5\n"
    )
    config = load(file)
    rates = RateLimits(config)
    alice, other = config.sae
    assert [rates.request(alice, 10.0), rates.request(alice, 10.0)] == [0, 1.0]
    assert rates.request(other, 10.0) == 0
    assert rates.keys(alice, 20, 10.0) == 0  # ten seconds' worth
    assert rates.keys(alice, 1, 10.0) == 0.5
    assert rates.keys(other, 10**6, 10.0) == 0


# check


@pytest.fixture
def site(tmp_path):
    [file, _] = write_pair(tmp_path, SitePlan("alice", "h1"), SitePlan("bob", "h2"))
    return file


def test_check_hints_and_is_content(site, tmp_path):
    result = runner.invoke(cli.app, ["check", str(site)])
    assert result.exit_code == 0, result.output
    assert "hint: [kme] site_key: none" in result.output
    assert "no device listens" in result.output
    key = tmp_path / "alice" / "site.key"
    assert runner.invoke(cli.app, ["site-key", str(key)]).exit_code == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert runner.invoke(cli.app, ["site-key", str(key)]).exit_code == 2  # never overwritten
    site.write_text(site.read_text().replace("[kme]\n", '[kme]\nsite_key = "site.key"\n', 1))
    assert "site_key" not in runner.invoke(cli.app, ["check", str(site)]).output


@pytest.mark.parametrize("fault", ["name", "usage", "site key", "store"])
def test_check_finds_what_would_not_work(site, fault):
    home = site.parent
    authority = Authority("x")
    made = authority.sae("kme-alice") if fault == "usage" else authority.kme("kme-alice", ["h1"])
    if fault == "name":
        made = authority.kme("kme-other", ["h1"])
    if fault in ("name", "usage"):
        (home / "pki/ca.crt").write_bytes(authority.certificate)
        (home / "pki/kme-alice.crt").write_bytes(made.certificate)
        (home / "pki/kme-alice.key").write_bytes(made.private_key)
    if fault == "site key":
        site.write_text(site.read_text().replace("[kme]\n", '[kme]\nsite_key = "credential:x"\n', 1))
    if fault == "store":
        (home / "kme-state").mkdir(mode=0o755)
        (home / "kme-state").chmod(0o755)
    result = runner.invoke(cli.app, ["check", str(site)])
    says = {
        "name": "common name is ['kme-other']",
        "usage": "extended key usage",
        "site key": "CREDENTIALS_DIRECTORY",
        "store": "must be 0700",
    }
    assert result.exit_code == 2
    assert says[fault] in result.output.replace("\n", " ")
    assert "without a mistake" not in result.output


@pytest.mark.parametrize(
    ("days", "fault", "says"), [(-1, True, "not valid before"), (800, False, "ends"), (900, True, "ended")]
)
def test_check_knows_the_day(site, days, fault, says):
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    about = [finding for finding in checks.findings(load(site), now) if ".crt" in finding.text]
    assert len(about) == 2  # ours, and the authority's
    assert all(finding.fault is fault and says in finding.text for finding in about)


def test_what_needs_a_restart_is_known(site):
    old, text = load(site), site.read_text()

    def after(*change):
        site.write_text(text.replace(*change))
        return needs_restart(old, load(site))

    assert not after("x", "x")
    assert not after('may_share_with = ["sae-bob"]', "may_share_with = []")
    assert not after('saes = ["sae-bob"]', 'saes = ["sae-bob", "c"]')
    assert not after("pki/kme-alice.crt", "pki/new.crt")
    assert "[kme]" in after("h1:8443", "h1:8445")
    assert "[[peer_kme]]" in after("https://h2:8444", "https://h2:9444")
    assert "[[link]]" in after("link/device.sock", "link/other.sock")
