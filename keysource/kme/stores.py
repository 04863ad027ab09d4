"""From the configuration to an open store: an SQLite file, or a few connections to a PostgreSQL."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from keysource.kme.config import KmeConfig
from keysource.kme.epochs import read_site_key, site_key_path
from keysource.kme.keystore import KeyStore
from keysource.kme.records import StoreError
from keysource.kme.store import Store
from keysource.private import read_secret

if TYPE_CHECKING:
    from keysource.kme.pgserver import Server


def is_shared(config: KmeConfig) -> bool:
    """Are other KME processes at the same store?"""
    return config.store.kind == "postgresql"


def workers(config: KmeConfig) -> int:
    """How many threads may be at the store at once."""
    return config.store.connections if is_shared(config) else 1


def open_stores(config: KmeConfig) -> list[KeyStore]:
    """One for each of the :func:`workers`; all see the same keys.  Raises :class:`StoreError`."""
    if is_shared(config):
        return list(_at_a_server(config))
    kme = config.kme
    store = Store(
        config.path(kme.store),
        kme.id,
        max_keys=config.limits.max_key_count,
        site_key=site_key_path(kme.site_key, config.path("")) if kme.site_key else None,
        epoch_keys=config.path(kme.epoch_keys) if kme.epoch_keys else None,
        now=time.time(),
    )
    return [store]


def server_of(config: KmeConfig) -> Server:
    """The PostgreSQL of a configuration, its password read.  Raises :class:`StoreError`."""
    try:
        from keysource.kme.pgserver import Server
    except ImportError as error:
        raise StoreError(f"[store] kind = postgresql needs the extra qvpn[postgres]: {error}") from None
    store = config.store
    password = None if store.password is None else _password(config, store.password)
    return Server(store.conninfo, password, store.require_standby, store.synchronous_commit, store.timeout)


def _at_a_server(config: KmeConfig) -> list[KeyStore]:
    server = server_of(config)
    from keysource.kme.postgres import PostgresStore, Process
    from keysource.kme.slots import Slots

    slots = None if config.kme.epoch_keys is None else Slots(config.path(config.kme.epoch_keys))
    process = Process(server, slots)
    site_key = read_site_key(site_key_path(config.kme.site_key or "", config.path("")))
    opened: list[KeyStore] = []
    with contextlib.ExitStack() as failed:
        for _ in range(config.store.connections):
            store = PostgresStore(
                process, config.kme.id, max_keys=config.limits.max_key_count, site_key=site_key, now=time.time()
            )
            failed.callback(store.close)
            opened.append(store)
        failed.pop_all()
    return opened


def _password(config: KmeConfig, text: str) -> str:
    path = site_key_path(text, config.path(""), "[store] password")
    try:
        return read_secret(path).decode().removesuffix("\n")
    except OSError as error:
        raise StoreError(f"{path}: the password of the database: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StoreError(f"{path}: the password of the database is no text") from None
    except ValueError as error:
        raise StoreError(f"the password of the database: {error}") from None
