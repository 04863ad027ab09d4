"""The programs that the benchmark compares with: where they are found, and how they are fetched when asked.

Debian's own release brings OpenVPN, tinc, iperf3 and the tools by ``apt-get install``.  wireguard-go and nebula of
that release are years old (wireguard-go without any offload), so those two come from the next release, *trixie*: the
apt source that this machine already has is read, its suite replaced, the packages are downloaded into a cache folder
and unpacked there.  Nothing of trixie is installed into the system, and no host is named here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from qvpn.bench.errors import BenchError

SUITE = "trixie"
FROM_SYSTEM = ("iperf3", "ethtool", "iputils-ping", "openvpn", "tinc", "wireguard-tools")
FROM_SUITE = ("wireguard-go", "nebula")
_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
_OLD_SOURCES = Path("/etc/apt/sources.list")
_PLACES = ("usr/bin", "usr/sbin", "bin", "sbin")


class InstallError(BenchError):
    """A program could not be fetched; one sentence."""


def cache_folder() -> Path:
    """Where unpacked packages are kept: ``$QVPN_BENCH_CACHE``, else below the user's cache folder."""
    if chosen := os.environ.get("QVPN_BENCH_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qvpn-bench"


def find(program: str) -> Path | None:
    """The program in the cache folder, else on the path; None if it is not there."""
    for place in _PLACES:
        unpacked = cache_folder() / "root" / place / program
        if os.access(unpacked, os.X_OK):
            return unpacked
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    return Path(found) if found else None


def need(program: str) -> str:
    """The program's path.  Raises BenchError where it is not installed."""
    found = find(program)
    if found is None:
        raise BenchError(f"{program} is not installed (make bench INSTALL=1 fetches it)")
    return str(found)


def package_version(package: str, program: Path) -> str:
    """The Debian version of the package that ``program`` came from; ``unknown version`` where nobody knows."""
    if program.is_relative_to(cache_folder()):
        kept = cache_folder() / "versions" / package
        return f"{kept.read_text().strip()} (Debian {SUITE})" if kept.exists() else "unknown version"
    said = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown version"


def install(say: Callable[[str], None]) -> None:
    """Fetch everything that is compared.  Raises InstallError."""
    say(f"apt-get install {' '.join(FROM_SYSTEM)}")
    _apt(["apt-get", "update"])
    _apt(["apt-get", "install", "--yes", "--no-install-recommends", *FROM_SYSTEM])
    say(f"{SUITE}: {' '.join(FROM_SUITE)} into {cache_folder()}")
    _from_suite(cache_folder())


def suite_source(text: str, suite: str = SUITE) -> str:
    """The first package source of a deb822 or one-line apt source list, for another suite.

    Raises InstallError where the text has no source of Debian's main archive.
    """
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"(?m)^([A-Za-z-]+):[ \t]*(.+)$", stanza))
        if "deb" in fields.get("Types", "").split() and "main" in fields.get("Components", "").split():
            options = f"[signed-by={fields['Signed-By']}] " if "Signed-By" in fields else ""
            return f"deb {options}{fields['URIs'].split()[0]} {suite} main\n"
    for line in text.splitlines():
        found = re.match(r"deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(.*\bmain\b.*)", line)
        if found:
            return f"deb {found[1] or ''}{found[2]} {suite} main\n"
    raise InstallError(f"the apt sources of this machine have no main archive to take {suite} from")


def _from_suite(cache: Path) -> None:
    for folder in ("lists/partial", "archives/partial", "debs"):
        (cache / "apt" / folder).mkdir(parents=True, exist_ok=True)
    options = _write_source(cache)
    _apt(["apt-get", *options, "update"])
    downloads = cache / "apt" / "debs"
    for old in downloads.glob("*.deb"):
        old.unlink()
    _apt(["apt-get", *options, "download", *FROM_SUITE], folder=downloads)
    (cache / "versions").mkdir(exist_ok=True)
    for package in sorted(downloads.glob("*.deb")):
        _apt(["dpkg-deb", "-x", str(package), str(cache / "root")])
        name, version = _apt(["dpkg-deb", "-W", "--showformat=${Package} ${Version}", str(package)]).split()
        (cache / "versions" / name).write_text(version + "\n")


def _write_source(cache: Path) -> list[str]:
    """The one-suite source list, and the options that make apt use it alone and keep its state in the cache."""
    texts = [place.read_text() for place in (_SOURCES, _OLD_SOURCES) if place.exists()]
    source = cache / "apt" / "suite.list"
    source.write_text(suite_source("\n\n".join(texts)))
    settings = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": cache / "apt" / "lists",
        "Dir::Cache::archives": cache / "apt" / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _apt(command: Sequence[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError:
        raise InstallError(f"{command[0]} is not on this machine: only Debian's packages can be installed") from None
    except subprocess.CalledProcessError as error:
        last = " | ".join(error.stderr.strip().splitlines()[-3:])
        raise InstallError(f"{' '.join(command[:2])} failed: {last}") from None
    except subprocess.TimeoutExpired:
        raise InstallError(f"{' '.join(command[:2])} took more than ten minutes") from None
    return done.stdout
