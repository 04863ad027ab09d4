"""PostgreSQL servers for tests: made in a temporary directory, on a Unix socket, by a user who is not root.

Nothing of the distribution's own cluster is used, started or touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

_PASSWORD, DATABASE_PASSWORD = "admin-of-tests", "kme-of-tests"


def binaries() -> Path | None:
    """Where initdb and its like are; None where PostgreSQL is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return places[-1].parent if places else None


def _user() -> dict[str, object]:
    """Who runs the servers: for subprocess."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise AssertionError("no user for PostgreSQL")


class Node:
    """One server; ``folder`` has its data, socket and log."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        self.process: subprocess.Popen[bytes] | None = None

    def conninfo(self, user: str = "qvpn", database: str = "qvpn") -> str:
        return f"host={self.folder} user={user} dbname={database}"

    def admin(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(self.conninfo("admin", database), password=_PASSWORD, autocommit=True)

    def run(self, program: str, *arguments: str) -> None:
        environment = os.environ | {"PGPASSWORD": _PASSWORD}
        command = [str(binaries() / program), *arguments]
        done = subprocess.run(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, **_user()
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        command = [str(binaries() / "postgres"), "-D", str(self.folder / "data")]
        for name, value in (self.settings | {"unix_socket_directories": str(self.folder)}).items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, **_user()
            )
        self.until_it_answers()

    def until_it_answers(self) -> None:
        end = time.monotonic() + 30
        while True:
            try:
                self.admin().close()
                return
            except psycopg.OperationalError as error:
                assert time.monotonic() < end, f"{error}\n{(self.folder / 'log').read_text()[-2000:]}"
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.03)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(20)
            self.process = None

    def kill(self) -> None:
        """The machine dies: the server and everything that it has started, all at once."""
        whole = [self.process.pid, *children(self.process.pid)]
        for pid in whole:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)
        self.process = None
        (self.folder / "data/postmaster.pid").unlink(missing_ok=True)


class Cluster:
    """A primary; standbys as they are asked for."""

    def __init__(self, *databases: str, **settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._folder.chmod(0o755)
        self.settings = {
            "listen_addresses": "",
            "max_connections": "60",
            "shared_buffers": "16MB",
            "wal_level": "replica",
            "hot_standby": "on",
            "log_checkpoints": "off",
            **settings,
        }
        self.nodes: list[Node] = []
        self.primary = self._node()
        password = self._folder / "password"
        password.write_text(_PASSWORD)
        password.chmod(0o644)
        data = str(self.primary.folder / "data")
        self.primary.run(
            "initdb", "-D", data, "-U", "admin", "-A", "scram-sha-256", f"--pwfile={password}",
            "-E", "UTF8", "--locale=C", "-N", "--no-instructions",
        )  # fmt: skip
        plain = self.primary.settings
        self.primary.settings = plain | {"synchronous_standby_names": ""}  # which would wait for nobody yet
        self.primary.start()
        with self.primary.admin() as admin:
            admin.execute(f"CREATE ROLE qvpn LOGIN PASSWORD '{DATABASE_PASSWORD}'")
            for name in databases or ("qvpn",):
                admin.execute(f"CREATE DATABASE {name} OWNER qvpn")
        self.primary.stop()
        self.primary.settings = plain

    def _node(self) -> Node:
        folder = self._folder / f"node{len(self.nodes)}"
        folder.mkdir(mode=0o755)
        if who := _user():
            os.chown(folder, who["user"], who["group"])
        node = Node(folder, dict(self.settings))
        self.nodes.append(node)
        return node

    def add_standby(self, of: Node) -> Node:
        node = self._node()
        source = f"host={of.folder} user=admin application_name={node.folder.name}"
        node.run(
            "pg_basebackup", "-D", str(node.folder / "data"), "-d", source, "-c", "fast", "-X", "stream", "-R", "-N"
        )
        node.start()
        return node

    def close(self) -> None:
        for node in self.nodes:
            node.stop()
        shutil.rmtree(self._folder)


def in_sync(node: Node) -> int:
    """How many standbys of a primary are synchronous now."""
    with node.admin() as admin:
        query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"
        return admin.execute(query).fetchone()[0]


def children(parent: int) -> list[int]:
    """Processes whose parent it is now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(after_name[1]) == parent:
                    found.append(int(entry.name))
    return found
