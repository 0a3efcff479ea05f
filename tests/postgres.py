"""A PostgreSQL server of one's own for tests: in a temporary folder, on a free port, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "tops3cret"
_USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


@dataclass(frozen=True)
class Server:
    """A running server with an empty database; its address holds the password."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        return self.address("postgres")

    def address(self, database: str) -> str:
        return f"postgresql://postgres:{PASSWORD}@localhost:{self.port}/{database}"

    def create(self, database: str) -> str:
        """A new, empty database; its address."""
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        words = [str(_program("createdb")), "-h", "localhost", "-p", str(self.port), "-U", "postgres", database]
        subprocess.run(words, check=True, env=environment, capture_output=True, timeout=30)
        return self.address(database)

    def start(self) -> None:
        options = f"-p {self.port} -c unix_socket_directories={self.folder} -c fsync=off -c listen_addresses=localhost"
        _run("pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "log", "-o", options, "start")

    def stop(self) -> None:
        _run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")


def available() -> bool:
    """Whether PostgreSQL is installed."""
    return _program("initdb") is not None


@contextmanager
def server() -> Iterator[Server]:
    """A server that runs as long as the context."""
    with tempfile.TemporaryDirectory(prefix="normwise-postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        user = _user()
        if user is not None:
            shutil.chown(folder, user)
        words = ("--username=postgres", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync")
        _run("initdb", "-D", folder / "data", *words)
        running = Server(folder, _free_port())
        running.start()
        try:
            yield running
        finally:
            running.stop()


def _run(program: str, *words: object) -> None:
    command = [str(_program(program)), *map(str, words)]
    # Its output goes to a file: the server keeps what it inherits open, and a pipe would be waited for.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(command, user=_user(), stdout=said, stderr=said, cwd="/", timeout=60, check=False)
        said.seek(0)
        assert done.returncode == 0, said.read().decode()


def _program(name: str) -> Path | None:
    """A program of PostgreSQL; Debian keeps them off the path, a folder for each version."""
    found = shutil.which(name)
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return Path(found) if found else versions[-1] if versions else None


def _user() -> str | None:
    """Whom to run as, if not as oneself."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in _USERS if name in known)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
