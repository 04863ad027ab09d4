"""Every command as a process of its own or through the guard: output, exit codes, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qvpn
from keysource.registry import available
from qvpn import privileged
from qvpn.cli.main import execute
from qvpn.config import identity
from qvpn.config.load import parse_config

INIT = ["--left", "alice@192.0.2.2:51840", "--right", "bob@198.51.100.2:51841"]


def qvpn_process(*arguments: str | Path, data: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qvpn", *map(str, arguments)],
        input=data,
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = execute([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(scope="module")
def made_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "sites"
    assert execute(["init", str(place), *INIT]) == 0
    return place


@pytest.fixture
def sites(tmp_path: Path, made_sites: Path) -> Path:
    return Path(shutil.copytree(made_sites, tmp_path / "sites"))


# keys


def test_keys_through_pipes() -> None:
    for level in ("3", "5"):
        made = qvpn_process("genkey", "--level", level)
        assert (made.returncode, made.stderr) == (0, b"")
        public = qvpn_process("pubkey", data=made.stdout)
        expected = identity.parse_private(made.stdout).public
        assert public.stdout == expected.pem()
        assert public.stderr.decode() == f"fingerprint {expected.readable}\n"
    psk = qvpn_process("genpsk")
    assert len(identity.parse_psk(psk.stdout)) == 32
    assert qvpn_process("genpsk").stdout != psk.stdout


def test_a_secret_into_a_readable_file_is_warned_about(tmp_path: Path) -> None:
    for mode, warned in ((0o644, True), (0o600, False)):
        path = tmp_path / str(mode)
        path.touch(mode)
        path.chmod(mode)
        with path.open("wb") as out:
            done = subprocess.run(
                [sys.executable, "-m", "qvpn", "genkey"], stdout=out, stderr=subprocess.PIPE, check=True
            )
        assert (b"others can read" in done.stderr) is warned


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff" * 100])
def test_pubkey_of_something_else(data: bytes) -> None:
    done = qvpn_process("pubkey", data=data)
    assert done.returncode == 1
    assert done.stdout == b""
    assert (
        done.stderr == b"qvpn: standard input must hold two PEM blocks of a private key and nothing else, "
        b"as qvpn writes them\n"
    )


# usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["genkey", "--level", "4"],
        ["genkey", "--level", "x"],
        ["genkey", "extra"],
        ["check"],
        ["up"],
        ["init"],
        ["init", "/nowhere", "--left", "alice@h:1"],
        ["demo", "--transport", "pigeon"],
        ["status", "--nosuch"],
    ],
)
def test_wrong_usage_is_2(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    assert err.strip()


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "--version") == (0, f"qvpn {qvpn.__version__}\n", "")
    code, out, _ = run(capfd, "--help")
    assert code == 0
    for command in ("genkey", "pubkey", "genpsk", "check", "up", "status", "down", "init", "demo"):
        assert command in out
        assert run(capfd, command, "--help")[0] == 0


# init


def test_init_writes_two_sites_that_fit(sites: Path) -> None:
    for site, peer, host, port in (("alice", "bob", "198.51.100.2", 51841), ("bob", "alice", "192.0.2.2", 51840)):
        folder = sites / site
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ["qvpn.toml", f"{site}.key", "alice.pub", "bob.pub", "courier.keys"]
        )
        config = parse_config((folder / "qvpn.toml").read_bytes(), folder / "qvpn.toml")
        assert (config.site.name, config.peer[0].name) == (site, peer)
        assert str(config.peer[0].endpoint) == f"{host}:{port}"
        own = identity.parse_private(privileged.read_secret(folder / f"{site}.key"))
        assert own.public.pem() == (folder / f"{site}.pub").read_bytes()
        assert (folder / f"{peer}.pub").read_bytes() == (sites / peer / f"{peer}.pub").read_bytes()
        assert folder.stat().st_mode & 0o777 == 0o700
        for secret in (f"{site}.key", "courier.keys"):
            assert (folder / secret).stat().st_mode & 0o777 == 0o600
    assert not list(sites.glob(".qvpn-init-*"))


def test_init_with_every_option(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capfd,
        *("init", tmp_path / "s", "--left", "alice@gw.example:51840", "--right", "bob@[2001:db8::2]:1000"),
        *("--rekey", "5s", "--left-net", "10.20.0.0/16", "--left-net", "fd20::/64", "--right-net", "10.30.0.0/16"),
    )
    assert code == 0
    for command in ("qvpn up alice/qvpn.toml", "qvpn up bob/qvpn.toml", "ping 10.90.0.2"):
        assert command in out
    alice = parse_config((tmp_path / "s/alice/qvpn.toml").read_bytes(), tmp_path / "s/alice/qvpn.toml")
    bob = parse_config((tmp_path / "s/bob/qvpn.toml").read_bytes(), tmp_path / "s/bob/qvpn.toml")
    assert [str(net) for net in alice.peer[0].allowed_ips] == ["10.90.0.2/32", "10.30.0.0/16"]
    assert [str(net) for net in bob.peer[0].allowed_ips] == ["10.90.0.1/32", "10.20.0.0/16", "fd20::/64"]
    assert (alice.peer[0].rekey, alice.peer[0].end) == (5, 15)
    assert (str(alice.peer[0].endpoint), str(bob.peer[0].endpoint)) == ("[2001:db8::2]:1000", "gw.example:51840")
    assert bob.site.listen.port == 1000


@pytest.mark.parametrize("kind", ["simulated", "etsi014"])
def test_init_with_simulated_keys_wants_the_flag(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    code, out, err = run(capfd, "init", tmp_path / "s", *INIT, "--key-source", kind)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "--allow-simulated" in err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("kind", "extra"), [("simulated", []), ("etsi014", ["link.toml", "kme.toml", "pki"])])
def test_init_with_the_simulated_link(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, extra: list[str]
) -> None:
    code, out, _ = run(capfd, "init", tmp_path, *INIT, "--key-source", kind, "--allow-simulated")
    assert code == 0
    assert ("qvpn-kme serve alice/kme.toml" in out) is (kind == "etsi014")
    pads = set()
    for site in ("alice", "bob"):
        made = {path.name for path in (tmp_path / site).iterdir()}
        assert made == {"qvpn.toml", f"{site}.key", "alice.pub", "bob.pub", "auth.pad", *extra}
        pads.add((tmp_path / site / "auth.pad").read_bytes())
        assert (tmp_path / site / "auth.pad").stat().st_mode & 0o777 == 0o600
        code, out, err = run(capfd, "check", tmp_path / site / "qvpn.toml")
        assert (code, err) == (0, "")
        assert "SIMULATED: no quantum security" in out
        text = (tmp_path / site / "qvpn.toml").read_text()
        assert "allow_simulated = true" in text
        (tmp_path / site / "qvpn.toml").write_text(text.replace("allow_simulated = true", "# "))
        code, _, err = run(capfd, "check", tmp_path / site / "qvpn.toml")
        assert code == 1
        assert "allow_simulated: [key_source." in err
    assert len(pads) == 1


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--key-source", "psk"], "qvpn: --key-source is one of simulated, etsi014, file, not 'psk'\n"),
        (["--rekey", "5"], 'qvpn: --rekey 5: write a duration such as "60s", "5m" or "1h"\n'),
        (
            ["--left-net", "10.20.0.0/16", "--right-net", "fd00::/64", "--right-net", "10.20.7.0/24"],
            "qvpn: --left-net 10.20.0.0/16 and --right-net 10.20.7.0/24 overlap: "
            "each address must be behind one site only\n",
        ),
        (
            ["--right-net", "10.90.0.0/24"],
            "qvpn: --right-net 10.90.0.0/24 holds 10.90.0.1, the inner address of site alice\n",
        ),
        (
            ["--left-net", "10.0.0.1/8"],
            "qvpn: --left-net: '10.0.0.1/8' has bits behind its prefix; did you mean \"10.0.0.0/8\"?\n",
        ),
        (
            ["--right", "bob@10.90.0.7:51840"],
            "qvpn: --right: 10.90.0.7 lies in 10.90.0.0/24, which is the inside of the tunnel\n",
        ),
        (["--rekey", "500ms"], 'qvpn: --rekey 500ms: it is outside "1s" to "1h"\n'),
        (["--right", "alice@192.0.2.9:1"], "qvpn: the two sites need different names\n"),
        (["--right", "bob"], "qvpn: --right bob: write NAME@HOST:PORT\n"),
        (["--right", "bob@::1:4"], "qvpn: --right bob@::1:4: an IPv6 address stands in brackets: [ADDRESS]:PORT\n"),
        (
            ["--right", "../bob@h:4"],
            "qvpn: --right ../bob@h:4: a name has 1 to 32 letters, digits, '-', '_' or '.', "
            "and starts with a letter or digit\n",
        ),
    ],
)
def test_init_used_wrongly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: list[str], sentence: str
) -> None:
    assert run(capfd, "init", tmp_path / "s", *INIT, *extra) == (2, "", sentence)
    assert not (tmp_path / "s").exists()


def test_init_that_cannot_work_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "init", tmp_path / "s", *INIT, "--left-net", "192.0.2.0/24")
    assert (code, out) == (1, "")
    assert err.startswith(f'{tmp_path}/s/bob/qvpn.toml: [[peer]] "alice" endpoint: 192.0.2.2 lies in 192.0.2.0/24')
    assert err.count("\n") == 1
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("site", ["alice", "bob"])
def test_init_replaces_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], site: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / site).mkdir()
    code, _, err = run(capfd, "init", tmp_path, *INIT)
    assert (code, err) == (1, f"qvpn: {tmp_path}/{site}: exists already, and nothing is overwritten\n")
    (tmp_path / site).rmdir()
    assert run(capfd, "init", tmp_path, *INIT)[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_init_into_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f").touch()
    assert run(capfd, "init", tmp_path / "f", *INIT) == (1, "", f"qvpn: {tmp_path}/f: is not a folder\n")
    code, _, err = run(capfd, "init", tmp_path / "f" / "below", *INIT)
    assert (code, err) == (1, f"qvpn: {tmp_path}/f/below: Not a directory\n")


# check


def test_check_says_what_it_found(sites: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = sites / "alice/qvpn.toml"
    code, out, err = run(capfd, "check", file)
    assert (code, err) == (0, "")
    prints = re.findall(r"fingerprint ((?:[A-Z2-7]{4}-){7}[A-Z2-7]{4})", out)
    expected = [identity.parse_public((sites / f"alice/{n}.pub").read_bytes()).readable for n in ("alice", "bob")]
    assert prints == expected
    assert out.startswith(f"{file}: fine\n")
    assert "key source courier (file): hop local, its keys survive harvesting of that hop\n" in out


def test_check_of_a_file_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "check", tmp_path / "no.toml") == (1, "", f"{tmp_path}/no.toml: does not exist\n")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda folder: (folder / "alice.key").unlink(),
            "{file}: [site] identity: {folder}/alice.key: does not exist\n",
        ),
        (
            lambda folder: (folder / "alice.key").chmod(0o644),
            "{file}: [site] identity: {folder}/alice.key: others than its owner have rights to it (mode 0644); "
            "run: chmod 600 {folder}/alice.key\n",
        ),
        (
            lambda folder: (folder / "bob.pub").write_bytes(b"nonsense"),
            '{file}: [[peer]] "bob" public_key: {folder}/bob.pub must hold two PEM blocks of a public key '
            "and nothing else, as qvpn writes them\n",
        ),
        (
            lambda folder: (folder / "bob.pub").write_bytes((folder / "alice.pub").read_bytes()),
            '{file}: [[peer]] "bob" public_key: it is this site\'s own public key\n',
        ),
        (
            lambda folder: (folder / "bob.pub").write_bytes(identity.generate(5).public.pem()),
            '{file}: [[peer]] "bob" public_key: {folder}/bob.pub has an ML-DSA-87 key, and suite 1 needs ML-DSA-65\n',
        ),
        (
            lambda folder: edit(folder, 'type = "file"', 'type = "flie"'),
            "{file}: [key_source.courier] type: unknown key source type 'flie'; installed are: "
            + ", ".join(available())
            + "\n",
        ),
        (
            lambda folder: edit(folder, 'rekey = "60s"', 'rekey = "60s"\nsuites = [3]'),
            '{file}: [[peer]] "bob" suites: suite 3 needs an ML-DSA-87 identity, and this site\'s is ML-DSA-65\n',
        ),
        (
            lambda folder: edit(folder, 'rekey = "60s"', 'rekey = "60s"\npsk = "bob.psk"'),
            '{file}: [[peer]] "bob" psk: {folder}/bob.psk: does not exist\n',
        ),
        (
            lambda folder: edit(folder, 'rekey = "60s"', 'rekey = "60s"\npsk = "alice.key"'),
            '{file}: [[peer]] "bob" psk: {folder}/alice.key must hold a PSK of 32 bytes in base64, '
            "as qvpn genpsk writes it\n",
        ),
        (
            lambda folder: edit(folder, "198.51.100.2:", "[::ffff:10.90.0.2]:"),
            '{file}: [[peer]] "bob" endpoint: 10.90.0.2 lies in 10.90.0.2/32, the allowed_ips of peer "bob": '
            "the tunnel would have to carry its own traffic\n",
        ),
        (
            lambda folder: (folder / "courier.keys").unlink(),
            "{file}: [key_source.courier] path: {folder}/courier.keys: No such file or directory\n",
        ),
        (
            lambda folder: (folder / "courier.keys").chmod(0o644),
            "{file}: [key_source.courier] path: {folder}/courier.keys: can be read by others (mode 0644); "
            "chmod 600 it\n",
        ),
        (
            lambda folder: (folder / "courier.keys").write_bytes(b"nonsense"),
            "{file}: [key_source.courier] path: {folder}/courier.keys: is not a file of key material\n",
        ),
    ],
)
def test_check_names_what_is_wrong(sites: Path, capfd: pytest.CaptureFixture[str], break_it, sentence: str) -> None:
    folder = sites / "alice"
    break_it(folder)
    expected = sentence.format(file=folder / "qvpn.toml", folder=folder)
    assert run(capfd, "check", folder / "qvpn.toml") == (1, "", expected)


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "qvpn.toml").read_text()
    assert old in text
    (folder / "qvpn.toml").write_text(text.replace(old, new))


def test_a_wrong_table_of_a_source_is_named(sites: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(sites / "alice", 'end = "a"', 'end = "c"')
    code, out, err = run(capfd, "check", sites / "alice/qvpn.toml")
    assert (code, out) == (1, "")
    assert err.startswith(f"{sites}/alice/qvpn.toml: [key_source.courier] end: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "file", "key"),
    [
        ("etsi014", "pki/sae-alice.key", "private_key"),
        ("etsi014", "pki/sae-alice.crt", "certificate"),
        ("etsi014", "pki/ca.crt", "ca"),
        ("simulated", "auth.pad", "auth_key"),
    ],
)
def test_check_reads_what_a_source_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, file: str, key: str
) -> None:
    assert run(capfd, "init", tmp_path, *INIT, "--key-source", kind, "--allow-simulated")[0] == 0
    folder = tmp_path / "alice"
    secret = key in ("private_key", "auth_key")
    if secret:
        (folder / file).chmod(0o640)
        code, out, err = run(capfd, "check", folder / "qvpn.toml")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f" {key}: {folder / file}: others than its owner have rights to it (mode 0640)" in err
    (folder / file).unlink()
    code, out, err = run(capfd, "check", folder / "qvpn.toml")
    assert (code, out) == (1, "")
    name = "kme" if kind == "etsi014" else "link"
    assert err == f"{folder}/qvpn.toml: [key_source.{name}] {key}: {folder / file}: does not exist\n"


# status, down


def test_status_and_down_without_a_daemon(sites: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "down"):
        code, out, err = run(capfd, command, sites / "alice/qvpn.toml")
        assert (code, out) == (1, "")
        assert err == f"qvpn: no daemon runs here: nobody listens at {sites}/alice/state/control.sock\n"
        code, out, err = run(capfd, command, sites / "nosuch.toml")
        assert (code, err) == (1, f"qvpn: {sites}/nosuch.toml: does not exist\n")


def test_status_without_a_file_and_without_daemons(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privileged, "run_folder", lambda: tmp_path)
    code, _, err = run(capfd, "status")
    assert (code, err) == (1, f"qvpn: no daemon of this user is listed in {tmp_path}; name its qvpn.toml\n")
    code, out, err = run(capfd, "status", "--json")
    assert (code, json.loads(out)["sites"], err) == (0, [], "")


# up


def test_up_without_rights_is_one_sentence(sites: Path) -> None:
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "qvpn"]
    else:
        command = [sys.executable, "-m", "qvpn"]
    done = subprocess.run([*command, "up", sites / "alice/qvpn.toml"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "qvpn: a tunnel needs the right to make network devices: run this as root (or with CAP_NET_ADMIN)\n"
    )


# the guard


def test_an_unexpected_error_is_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> bytes:
        raise KeyError("something secret")

    monkeypatch.setattr(privileged, "read_public", broken)
    code, out, err = run(capfd, "check", "x.toml")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"qvpn: internal error: KeyError in test_cli\.py line \d+; run it again with .+\n", err)
    assert "QVPN_DEBUG=1" in err
    monkeypatch.setenv("QVPN_DEBUG", "1")
    assert execute(["check", "x.toml"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_ctrl_c_is_130_and_quiet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(privileged, "read_public", interrupted)
    assert run(capfd, "check", "x.toml") == (130, "", "")


def test_a_closed_pipe_is_no_traceback(sites: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "qvpn", "check", sites / "alice/qvpn.toml"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", ["genkey", "check"])
def test_a_full_disk_is_one_sentence(sites: Path, command: str) -> None:
    arguments = [command] if command == "genkey" else [command, sites / "alice/qvpn.toml"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qvpn", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"qvpn: No space left on device\n")


def test_status_text_of_a_site(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What people read comes from the same object that --json prints."""
    from qvpn import uapi
    from qvpn.status import SIMULATED, EpochView, PathView, PeerView, SiteView, SourceView

    epoch = EpochView(3, "qkd", "initiator", 12.34, 60.0, 20.0, "simulated", "0badcafe", SIMULATED)
    peer = PeerView(
        "bob", "qkd", "require-qkd", "AAAA", "192.0.2.2:51840", "link", epoch, SIMULATED, 12.3, 2, 3, 3, 0.021,
        1, "no_key: empty", 0, None, 10, 1000, 11, 1100, 0.5, 11, 11, 9, 8, 1,
        PathView(1300, 1230, 1500, "probe", 3.0, 40, 20, 1, 7), {"replay": 2},
    )  # fmt: skip
    source = SourceView("link", "simulated", True, "", "simulated", "local", True, 5, 1.5, 0.0123, None, 0)
    site = SiteView(
        "alice",
        1,
        "0",
        100.0,
        "BBBB",
        "[::]:51840",
        "qvpn0",
        1400,
        (peer,),
        (source,),
        {"no_route": 1},
        queues={"longest": 0.012, "received_longest": 0.003, "marked": 4, "received_marked": 2, "packets": 9},
    )
    monkeypatch.setattr(privileged, "listed_sockets", lambda: [Path("x")])
    monkeypatch.setattr(uapi, "ask", lambda path, request: {"ok": True, "status": site.to_json()})
    code, out, _ = run(capfd, "status")
    assert "path mtu 1300 (probe), 1230 inside, link 1500" in out
    assert code == 0
    for text in (
        "peer bob: QKD  policy require-qkd  192.0.2.2:51840",
        SIMULATED,
        "epoch 3 (qkd, initiator)  age 12s  next rekey in 20s  hard end in 1m",
        "key 0badcafe from simulated",
        "failures 1, last: no_key: empty",
        "drops replay 2",
        "drops no_route 1",
        "waited at most 12.0 ms to be sealed, 3.0 ms to be opened; told to slow down 6 times",
        "key source link (simulated): ready",
        "QBER 1.23%",
    ):
        assert text in out
    code, out, _ = run(capfd, "status", "--json")
    assert json.loads(out) == {"schema": 1, "sites": [{"schema": 1, **json.loads(json.dumps(site.to_json()))}]}


def test_the_doctor_looks_at_every_source(capfd: pytest.CaptureFixture[str], sites: Path) -> None:
    code, out, err = run(capfd, "doctor", sites / "alice/qvpn.toml")
    assert (code, err) == (0, "")
    assert out.startswith("key source courier\n  fine    keys for the peer: ready")
    (sites / "alice/courier.keys").unlink()
    code, out, err = run(capfd, "doctor", sites / "alice/qvpn.toml", "--json")
    assert (code, err) == (1, "")
    [finding] = json.loads(out)["courier"]
    assert finding["state"] == "wrong"
    assert "courier.keys" in finding["said"]
