"""Identities as PEM, fingerprints, PSKs; and who may read a secret file."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from qvpn import privileged
from qvpn.config import identity
from qvpn.config.errors import IdentityError
from qvpn.privileged import PrivilegedError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize("level", [3, 5])
def test_an_identity_is_read_back(level: int) -> None:
    made = identity.generate(level)
    again = identity.parse_private(made.pem())
    public = identity.parse_public(made.public.pem())
    assert again.pem() == made.pem()
    assert again.level == public.level == level
    assert again.public.fingerprint == public.fingerprint
    assert made.pem().count(b"PRIVATE KEY") == 4
    assert public.pem().count(b"PUBLIC KEY") == 4


def test_levels_differ_in_the_fingerprint_and_others_are_refused() -> None:
    public = identity.generate(3).public
    expected = hashlib.sha384(b"\x01" + public.ed25519.public_bytes_raw() + public.mldsa.public_bytes_raw()).digest()
    assert public.fingerprint == expected
    assert public.readable.replace("-", "") == base64.b32encode(expected[:20]).decode()
    assert re.fullmatch(r"([A-Z2-7]{4}-){7}[A-Z2-7]{4}", public.readable)
    with pytest.raises(ValueError, match="a level is 3"):
        identity.generate(4)


def test_nothing_secret_in_a_repr() -> None:
    made = identity.generate()
    assert repr(made) == "Identity(level=3)"


@pytest.mark.parametrize("lost", range(2))
def test_a_file_with_one_block_is_refused(lost: int) -> None:
    made = identity.generate()
    blocks = made.pem().split(b"-----BEGIN PRIVATE KEY-----")[1:]
    half = b"-----BEGIN PRIVATE KEY-----" + blocks[lost]
    with pytest.raises(IdentityError, match="must hold two PEM blocks of a private key"):
        identity.parse_private(half)


def test_swapped_doubled_and_foreign_blocks_are_refused() -> None:
    ed = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made = identity.generate()
    mldsa = made.pem()[made.pem().index(b"-----BEGIN", 10) :]
    for wrong in (ed + ed, mldsa + ed, mldsa + mldsa):
        with pytest.raises(IdentityError, match="must hold an Ed25519 key and then an ML-DSA"):
            identity.parse_private(wrong)
    with pytest.raises(IdentityError, match="and nothing else"):
        identity.parse_private(made.pem() + b"more")


def test_private_and_public_are_not_mistaken_for_each_other() -> None:
    made = identity.generate()
    with pytest.raises(IdentityError, match="a private key never leaves its site"):
        identity.parse_public(made.pem())
    with pytest.raises(IdentityError, match="holds a public key where the private identity belongs"):
        identity.parse_private(made.public.pem())


def test_a_damaged_key_is_refused_without_its_bytes() -> None:
    pem = identity.generate().pem()
    line = pem.splitlines()[1]
    with pytest.raises(IdentityError) as caught:
        identity.parse_private(pem.replace(line, line[:-6] + b"AAAAAA", 1).replace(b"MC4", b"MD4", 1))
    assert str(caught.value) == "holds a private key that cannot be read"
    assert caught.value.__suppress_context__


def test_openssl_reads_both_blocks(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    path = tmp_path / "alice.pub"
    path.write_bytes(identity.generate().public.pem())
    done = subprocess.run([openssl, "pkey", "-pubin", "-in", path, "-text", "-noout"], capture_output=True, text=True)
    assert "ED25519" in done.stdout


def test_a_psk_is_read_back_and_others_refused() -> None:
    text = identity.generate_psk()
    assert len(identity.parse_psk(text)) == 32
    assert identity.parse_psk(text) == base64.b64decode(text)
    for wrong in (b"", b"x", text[:-4], text + text, base64.b64encode(b"x" * 31)):
        with pytest.raises(IdentityError, match="must hold a PSK of 32 bytes in base64"):
            identity.parse_psk(wrong)
    with pytest.raises(IdentityError, match="holds a PSK of zeros, which is no secret"):
        identity.parse_psk(base64.b64encode(bytes(32)))


# files


def secret(path: Path, mode: int = 0o600) -> Path:
    path.write_bytes(b"secret")
    path.chmod(mode)
    return path


def test_a_secret_of_ours_is_read(tmp_path: Path) -> None:
    assert privileged.read_secret(secret(tmp_path / "k")) == b"secret"
    assert privileged.read_secret(secret(tmp_path / "k", 0o400)) == b"secret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644])
def test_a_secret_that_others_have_rights_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path / "k", mode)
    with pytest.raises(PrivilegedError) as caught:
        privileged.read_secret(path)
    assert str(caught.value) == (
        f"{path}: others than its owner have rights to it (mode {mode:04o}); run: chmod 600 {path}"
    )


@root_only
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    path = secret(tmp_path / "k")
    os.chown(path, 65534, 65534)
    with pytest.raises(PrivilegedError, match=r"belongs to user 65534, not to user 0.*run: chown 0 "):
        privileged.read_secret(path)


@root_only
def test_a_state_folder_of_another_user_is_refused_with_what_helps(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    with pytest.raises(PrivilegedError, match=r"belongs to user 65534, not to user 0.*run: chown -R 0 "):
        privileged.StateFolder(state)


def test_a_file_that_could_not_be_written_whole_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PrivilegedError, match="no space left on device"):
            privileged.write_secret(tmp_path / "k", b"1")
    assert not (tmp_path / "k").exists()
    privileged.write_secret(tmp_path / "k", b"2")


def test_links_folders_pipes_and_giants_are_refused(tmp_path: Path) -> None:
    secret(tmp_path / "k")
    (tmp_path / "link").symlink_to("k")
    os.mkfifo(tmp_path / "fifo", 0o600)
    secret(tmp_path / "giant").write_bytes(bytes((1 << 20) + 1))
    for name, reason in [
        ("link", "is a symbolic link"),
        (".", "is not a regular file"),
        ("fifo", "is not a regular file"),
        ("giant", "is larger than 1048576 bytes"),
        ("missing", "does not exist"),
    ]:
        with pytest.raises(PrivilegedError, match=reason):
            privileged.read_secret(tmp_path / name)
    assert privileged.read_public(tmp_path / "link") == b"secret"


def test_written_files_have_their_mode_whatever_the_umask_and_replace_nothing(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        privileged.write_secret(tmp_path / "k", b"1")
        os.umask(0o777)
        privileged.write_public(tmp_path / "p", b"2")
    finally:
        os.umask(old)
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o644
    with pytest.raises(PrivilegedError, match="exists already, and nothing is overwritten"):
        privileged.write_secret(tmp_path / "k", b"3")
    assert (tmp_path / "k").read_bytes() == b"1"
    (tmp_path / "dangling").symlink_to("elsewhere")
    with pytest.raises(PrivilegedError, match="exists already"):
        privileged.write_secret(tmp_path / "dangling", b"3")
    assert not (tmp_path / "elsewhere").exists()


def test_a_state_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    first = privileged.StateFolder(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with pytest.raises(PrivilegedError, match="another qvpn daemon runs with this state folder"):
        privileged.StateFolder(tmp_path / "state")
    first.close()
    first.close()
    privileged.StateFolder(tmp_path / "state").close()


def test_a_state_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o750)
    with pytest.raises(PrivilegedError, match="must be ours alone; run: chmod 700"):
        privileged.StateFolder(tmp_path / "state")
    with pytest.raises(PrivilegedError, match="cannot be used: does not exist"):
        privileged.StateFolder(tmp_path / "no" / "state")
