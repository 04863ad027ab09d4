"""A connection to the PostgreSQL of a site that knows when it does not know.

A key may be handed out only after the deletion of its row is on the disks of the primary *and* of a standby: else
a failover would bring the row back.  PostgreSQL waits for that by itself where ``synchronous_standby_names`` is set,
but can be talked out of it, each time with a commit that looks like success or like nothing:

* the setting is emptied (by hand, or by a failover tool without strict synchronous mode): asked at the beginning of
  every transaction and again after every commit;
* the wait is cancelled: the server says so in a mere notice, so *any* notice during a commit counts as doubt;
* the connection breaks during the commit: nobody knows.

In doubt the commit has failed for the caller, and keys in its hand are nobody's.  From then on one commit of no
consequence is tried, twice a second at most, and everything else refused, until one goes through: a standby that is
away costs the keys of the requests under way, not those of every request to come.

A standby that was promoted has a higher timeline.  A server of a lower one than this process has seen is an old
primary that came back, and is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from keysource.kme.records import NO_STANDBY, StoreError
from keysource.kme.vault import Rows

_T = TypeVar("_T")
_USUAL: dict[str, Any] = {
    "target_session_attrs": "read-write",
    "connect_timeout": 2,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
_PROBE_EVERY = 0.5
_CUT_AFTER = 1.0
_STATE = (
    "SELECT (SELECT coalesce(max(number), 0) FROM epoch), current_setting('synchronous_standby_names'),"
    " pg_is_in_recovery()"
)
# A commit of no consequence: it goes through only where a standby confirms it.
PROBE = "INSERT INTO meta VALUES ('probe', '') ON CONFLICT (name) DO UPDATE SET value = ''"
_TIMELINE = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"


class InUse(StoreError):
    """A row cannot go: others refer to it."""


@dataclass(slots=True)
class Server:
    """Where the server is, and what all connections of this process know about it."""

    conninfo: str
    """libpq's ``key=value`` words, without a password; of several hosts the one that is primary is taken."""
    password: str | None = field(default=None, repr=False)
    require_standby: bool = True
    synchronous_commit: str = "on"
    timeout: float = 2.0
    """Seconds for one transaction, commit included."""
    doubt: str = ""
    timeline: int = 0
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    """Stands in the ``application_name`` of every session of this process: what PostgreSQL has none of, is dead."""
    probed: float = 0.0
    probing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def where(self) -> str:
        """For messages: hosts and database."""
        told = conninfo_to_dict(self.conninfo)
        return f"PostgreSQL {told.get('dbname', '?')!r} at {told.get('host', 'the default socket')}"

    def connect(self) -> psycopg.Connection[Any]:
        """A session at the primary that is ready for use: of several, the one of the highest timeline.

        Raises:
            StoreError: there is none, or only an old one.
        """
        best: tuple[int, psycopg.Connection[Any]] | None = None
        reasons = []
        for words in self._places():
            try:
                timeline, connection = self._try(words)
            except psycopg.Error as error:
                reasons.append(_first_line(error))
                continue
            if best is not None and best[0] >= timeline:
                connection.close()
                continue
            if best is not None:
                best[1].close()
            best = timeline, connection
        if best is None:
            raise StoreError(f"{self.where}: {'; '.join(reasons)}")
        timeline, connection = best
        if timeline < self.timeline:
            connection.close()
            raise StoreError(
                f"{self.where}: this server is on timeline {timeline}, the one before was on {self.timeline}: an old"
                " primary has come back and must not be used"
            )
        self.timeline = max(self.timeline, timeline)  # other threads connect, too
        return connection

    def _places(self) -> Iterator[dict[str, Any]]:
        """The words of the conninfo once for each host in it."""
        words = {**_USUAL, **conninfo_to_dict(self.conninfo)}
        lists = {name: str(words[name]).split(",") for name in ("host", "hostaddr", "port") if words.get(name)}
        for place in range(max([1, *(len(some) for some in lists.values())])):
            words |= {"application_name": f"qvpn-kme {self.session}"}
            yield words | {name: some[place % len(some)] for name, some in lists.items()}

    def _try(self, words: dict[str, Any]) -> tuple[int, psycopg.Connection[Any]]:
        connection: psycopg.Connection[Any] = psycopg.connect(**words, password=self.password, autocommit=True)
        try:
            level = "remote_apply" if self.synchronous_commit == "remote_apply" else "on"
            connection.execute(f"SET synchronous_commit = {level}")
            connection.execute("SET default_transaction_isolation = 'read committed'")
            connection.execute("SET idle_in_transaction_session_timeout = '10s'")
            row = connection.execute(_TIMELINE).fetchone()
            return (int(row[0]) if row else 0), connection
        except psycopg.Error:
            connection.close()
            raise


class PgDatabase:
    """One connection for one thread, made when it is needed and again when it broke; placeholders as in SQLite."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._connection: psycopg.Connection[Any] | None = None
        self._inside = False
        self._notice = ""
        self._watchdog = _Watchdog(self._bite)
        self._watchdog.start()

    def close(self) -> None:
        self._watchdog.stop()
        self._drop()

    def execute(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Rows:
        """Raises :class:`StoreError`."""
        return self._do(lambda connection: connection.execute(_translated(query), values))

    def executemany(self, query: str, rows: Iterable[Sequence[Any]]) -> Rows:
        """In one go.  Raises :class:`StoreError`."""

        def run(connection: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
            cursor = connection.cursor()
            cursor.executemany(_translated(query), rows)
            return cursor

        return self._do(run)

    def begin(self, *, local: bool = False) -> int:
        """Begin a transaction where one can be made safe.  ``local``: losing it in a failover does not matter.

        Returns the number of the current epoch.

        Raises:
            StoreError: no server, no standby is asked for, or the last commit is still in doubt.
        """
        self._be_sure()
        return self._begin(local)

    def begin_unchecked(self) -> None:
        """For the tables themselves."""
        self._do(lambda connection: connection.execute("BEGIN"))
        self._inside = True

    def commit(self, *, local: bool = False) -> None:
        """Raises :class:`StoreError`: it failed, or nobody knows whether it did."""
        connection, self._notice = self._connection, ""
        try:
            if connection is None:
                raise psycopg.OperationalError("the connection was lost")
            with self._watched():
                ended = connection.execute("COMMIT", prepare=False).statusmessage
            if ended != "COMMIT":
                raise StoreError(f"{self.server.where}: the transaction was rolled back")
            if not local:
                self._must_be_confirmed(connection)
        except psycopg.Error as error:
            self._drop()
            self._in_doubt(_first_line(error))
        finally:
            self._inside = False

    def rollback(self) -> None:
        """What was begun is not to be; a lost connection does the same."""
        if not self._inside:
            return
        self._inside = False
        connection = self._connection
        try:
            if connection is not None:
                with self._watched():
                    connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            self._drop()

    # Doubt

    def _must_be_confirmed(self, connection: psycopg.Connection[Any]) -> None:
        if self._notice:
            self._in_doubt(self._notice)
        if self.server.require_standby:
            with self._watched():
                row = connection.execute("SHOW synchronous_standby_names").fetchone()
            if not row or not row[0]:
                self._in_doubt(NO_STANDBY)

    def _in_doubt(self, reason: str) -> NoReturn:
        self.server.doubt = reason
        raise StoreError(f"{self.server.where}: a commit is not confirmed, nothing of it is handed out: {reason}")

    def _be_sure(self) -> None:
        server = self.server
        if not server.doubt:
            return
        if time.monotonic() < server.probed + _PROBE_EVERY or not server.probing.acquire(blocking=False):
            raise StoreError(f"{server.where}: no commit is confirmed since: {server.doubt}")
        try:
            self._begin(local=False)
            try:
                self.execute(PROBE)
                self.commit()
            except BaseException:
                self.rollback()
                raise
            server.doubt = ""
        finally:
            server.probed = time.monotonic()
            server.probing.release()

    def _begin(self, local: bool) -> int:
        statement = "BEGIN; SET LOCAL synchronous_commit = off; " if local else "BEGIN; "

        def run(connection: psycopg.Connection[Any]) -> Any:
            cursor = connection.execute(statement + _STATE, prepare=False)
            while cursor.nextset():
                pass
            return cursor.fetchone()

        try:
            row = self._do(run)
        except StoreError:
            self._drop()  # it may have begun
            raise
        self._inside = True
        number, standbys, recovering = row
        if recovering or (self.server.require_standby and not standbys):
            self.rollback()
            self._drop()  # another host of the list may be the primary now
            reason = "the server is a standby" if recovering else NO_STANDBY
            raise StoreError(f"{self.server.where}: {reason}")
        return int(number)

    # The connection

    def _do(self, run: Callable[[psycopg.Connection[Any]], _T]) -> _T:
        """Once more where an idle connection had died, with the server or on the way: nothing was done yet."""
        idle = self._connection is not None and not self._inside
        try:
            return self._once(run)
        except StoreError:
            if not idle or self._connection is not None:
                raise
            return self._once(run)

    def _once(self, run: Callable[[psycopg.Connection[Any]], _T]) -> _T:
        connection = self._ready()
        try:
            with self._watched():
                return run(connection)
        except psycopg.errors.ForeignKeyViolation as error:
            raise InUse(f"{self.server.where}: {_first_line(error)}") from None
        except psycopg.Error as error:
            if connection.closed:
                self._drop()
            raise StoreError(f"{self.server.where}: {_first_line(error)}") from None

    def _ready(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            if self._inside:
                raise StoreError(f"{self.server.where}: the connection was lost")
            self._connection = self.server.connect()
            self._connection.add_notice_handler(self._noticed)
        return self._connection

    def _noticed(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self._notice = diagnostic.message_primary or "a notice without text"

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        self._watchdog.until = time.monotonic() + self.server.timeout
        try:
            yield
        finally:
            self._watchdog.until = None

    def _bite(self, late: float) -> None:
        """A statement takes too long: have the server end it; if it cannot be asked to, cut the connection."""
        connection = self._connection
        if connection is None:
            return
        with contextlib.suppress(psycopg.Error, OSError):
            if late < _CUT_AFTER:
                connection.cancel_safe(timeout=_CUT_AFTER)
            else:
                with socket.socket(fileno=os.dup(connection.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)


class _Watchdog(threading.Thread):
    """Looks ten times a second whether it is late."""

    def __init__(self, bite: Callable[[float], None]) -> None:
        super().__init__(name="store watchdog", daemon=True)
        self.until: float | None = None
        self._bite = bite
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.1):
            until = self.until
            if until is not None and (late := time.monotonic() - until) > 0:
                self._bite(late)

    def stop(self) -> None:
        self._over.set()


@functools.cache
def _translated(query: str) -> Any:
    """SQLite's placeholders to psycopg's; our queries have no ``?`` and no ``:name`` in any text."""
    return re.sub(r"(?<!:):([a-z]+)", r"%(\1)s", query.replace("?", "%s"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
