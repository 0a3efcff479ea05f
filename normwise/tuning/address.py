"""The address of a study's storage: connected to so that several machines may share it, shown without its password."""

from __future__ import annotations

import re
import time
import warnings
import weakref
from importlib.util import find_spec
from typing import Any

import optuna
import sqlalchemy.exc
from sqlalchemy import event
from sqlalchemy.engine import URL, Engine, make_url

from normwise.errors import MissingExtraError

HEARTBEAT_SECONDS = 10  # between two signs of life of a trial
GRACE_SECONDS = 90  # without one until a trial is given to another worker; longer than a storage is waited for
_LOCK_SECONDS = 60  # that one process waits for another to let go of an SQLite file
_TRIES = 5  # to connect, while other processes make the tables of a new storage
_PAUSE_SECONDS = 0.2  # between two of them
_HIDDEN = "***"
_PASSWORD = re.compile(r"^(\w[\w+]*://[^:/]*:)[^@]*@")  # as SQLAlchemy reads it
_QUERIED = re.compile(r"([?&][^=&]*password[^=&]*=)[^&]*", re.IGNORECASE)


def connect(url: str | None) -> Any:
    """Optuna's storage at an address, with its tables; None: in memory.

    Raises MissingExtraError for PostgreSQL without its driver, and what SQLAlchemy raises for what cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        return optuna.storages.get_storage(None)
    address = _with_driver(url)
    tries = 0
    while True:
        try:
            return optuna.storages.get_storage(_database(address))
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError) as e:
            tries += 1
            if tries == _TRIES or not _made_meanwhile(e):
                raise
        time.sleep(_PAUSE_SECONDS)


def shown(url: str | None) -> str:
    """The storage's address in a sentence, without its password.

    >>> shown("postgresql://ada:secret@host/studies")
    'the storage postgresql://ada:***@host/studies'
    """
    if url is None:
        return "the storage in memory"
    plain = without_password(url)
    return f"the storage {plain}" if plain else "the storage"


def without_password(url: str) -> str:
    """The address with *** for its password, wherever that stands; nothing at all for what is no address.

    >>> without_password("postgresql://host/studies?user=ada&password=secret")
    'postgresql://host/studies?user=ada&password=***'
    """
    try:
        _parsed(url)
    except sqlalchemy.exc.ArgumentError:
        return ""
    return _QUERIED.sub(rf"\1{_HIDDEN}", _PASSWORD.sub(rf"\1{_HIDDEN}@", url))


def purged(text: str, url: str | None) -> str:
    """A driver's message without the password, which some repeat.

    >>> purged("no access with secret", "postgresql://ada:secret@host/studies")
    'no access with ***'
    """
    for secret in _secrets(url):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(url: str | None) -> list[str]:
    try:
        address = _parsed(url or "")
    except sqlalchemy.exc.ArgumentError:
        return [url] if url else []
    queried = [str(value) for key, value in address.query.items() if "password" in key.lower()]
    return [secret for secret in (address.password, *queried) if secret]


def _parsed(url: str) -> URL:
    """The parts of an address. Raises SQLAlchemy's ArgumentError, which repeats none of them, for what is none."""
    try:
        return make_url(url)
    except ValueError:  # what stands for the port may be a piece of the password
        raise sqlalchemy.exc.ArgumentError("its port is no number; write an @ in a password as %40") from None


def _with_driver(url: str) -> str:
    """Plain postgresql:// means psycopg, whatever SQLAlchemy's version takes it for."""
    driver, _, rest = url.partition("://")
    if driver not in ("postgresql", "postgres", "postgresql+psycopg"):
        return url
    if find_spec("psycopg") is None:
        raise MissingExtraError("a PostgreSQL storage", "postgres")
    return f"postgresql+psycopg://{rest}"


def _database(url: str) -> optuna.storages.RDBStorage:
    address = _parsed(url)
    kind = address.get_backend_name()
    file = kind == "sqlite" and address.database not in (None, "", ":memory:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        storage = optuna.storages.RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a format string
            engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}} if kind == "sqlite" else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
        )
    weakref.finalize(storage, storage.engine.dispose)
    if file:
        storage.engine.dispose()  # what is set here holds for connections made from now on
        _take_turns(storage.engine)
    elif kind == "postgresql":
        storage.engine.dispose()
        event.listen(storage.engine, "connect", _in_utc)
    return storage


def _take_turns(engine: Engine) -> None:
    """Make every transaction on an SQLite file begin with its lock, as SQLAlchemy's documentation advises.

    SQLite has no SELECT FOR UPDATE, by which Optuna claims a trial: two processes would both read that it is waiting.
    """
    event.listen(engine, "connect", _without_own_begin)
    event.listen(engine, "begin", _begin_with_lock)


def _without_own_begin(connection: Any, _: object) -> None:
    connection.isolation_level = None


def _begin_with_lock(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _in_utc(connection: Any, _: object) -> None:
    """Signs of life are stored without a time zone, so all sessions must have the same, and none with summer time."""
    before, connection.autocommit = connection.autocommit, True
    connection.cursor().execute("SET TIME ZONE 'UTC'")
    connection.autocommit = before


def _made_meanwhile(error: sqlalchemy.exc.DBAPIError) -> bool:
    """Whether another process made the same table in the same moment; SQLite says so in an error of another kind."""
    return not isinstance(error, sqlalchemy.exc.OperationalError) or "already exists" in str(error)
