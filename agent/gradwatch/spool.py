"""What is not acknowledged yet, on disk: one SQLite file an agent, which whoever comes later can deliver."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

MOST_BYTES = 256 * 1024 * 1024
"""Room for one agent's spool on disk."""
MOST_BYTES_IN_MEMORY = 64 * 1024 * 1024
"""Room where no disk takes it."""


class Entry(NamedTuple):
    """One document that waits."""

    number: int
    kind: str
    """``run`` or ``batch``."""
    samples: int
    body: bytes


def folder() -> Path:
    """Return where spools lie: ``GRADWATCH_SPOOL_DIR``, or the user's cache."""
    chosen = os.environ.get("GRADWATCH_SPOOL_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradwatch"


class Spool:
    """A bounded queue of documents of one run; used by one thread.

    On disk where that is possible (WAL, synced), in memory otherwise: ``broken`` then says why. Over its bound the
    oldest batches go first; ``dropped_samples`` and ``dropped_bytes`` count them.
    """

    def __init__(self, path: Path, url: str, run_id: str) -> None:
        self.path = path
        self.url = url
        self.run_id = run_id
        self.broken: str | None = None
        self.dropped_samples = 0
        self.dropped_bytes = 0
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._memory: list[Entry] = []
        self._number = 0
        self._bytes = 0
        try:
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._give_up_disk(error)

    @classmethod
    def of(cls, directory: Path, url: str, run_id: str, attempt: int) -> Self:
        """Return the spool of an agent's attempt."""
        return cls(directory / f"{run_id}-{attempt}.spool", url, run_id)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        if self._lock is None:
            raise OSError(f"{self.path} is in use by another process")
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE IF NOT EXISTS target (url TEXT, run TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS waiting (number INTEGER PRIMARY KEY, kind TEXT, samples INTEGER, body BLOB)"
        )
        if self._database.execute("SELECT count(*) FROM target").fetchone()[0] == 0:
            self._database.execute("INSERT INTO target VALUES (?, ?)", (self.url, self.run_id))
        number, size = self._database.execute("SELECT max(number), sum(length(body)) FROM waiting").fetchone()
        self._number, self._bytes = number or 0, size or 0

    def _give_up_disk(self, error: Exception) -> None:
        self.broken = f"{self.path}: {error}"
        if self._database is not None:
            with suppress(sqlite3.Error):
                rows = self._database.execute("SELECT number, kind, samples, body FROM waiting ORDER BY number")
                self._memory = [Entry(*row) for row in rows]
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def append(self, kind: str, samples: int, body: bytes) -> None:
        """Keep a document until it is acknowledged."""
        self._number += 1
        entry = Entry(self._number, kind, samples, body)
        if self._database is not None:
            try:
                self._database.execute("INSERT INTO waiting VALUES (?, ?, ?, ?)", entry)
            except sqlite3.Error as error:
                self._give_up_disk(error)
        if self._database is None:
            self._memory.append(entry)
        self._bytes += len(body)
        self._thin()

    def _thin(self) -> None:
        most = MOST_BYTES_IN_MEMORY if self._database is None else MOST_BYTES
        while self._bytes > most:
            oldest = next((entry for entry in self._entries() if entry.kind == "batch"), None)
            if oldest is None:
                return
            self.dropped_samples += oldest.samples
            self.dropped_bytes += len(oldest.body)
            self.remove(oldest)

    def first(self) -> Entry | None:
        """Return the document that waits longest."""
        return next(self._entries(), None)

    def _entries(self) -> Iterator[Entry]:
        if self._database is None:
            yield from list(self._memory)
            return
        try:
            rows = self._database.execute(
                "SELECT number, kind, samples, body FROM waiting ORDER BY number LIMIT 2"
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up_disk(error)
            rows = self._memory
        yield from (Entry(*row) for row in rows)

    def remove(self, entry: Entry) -> None:
        """Forget an acknowledged document."""
        self._bytes -= len(entry.body)
        if self._database is not None:
            try:
                self._database.execute("DELETE FROM waiting WHERE number = ?", (entry.number,))
            except sqlite3.Error as error:
                self._give_up_disk(error)
        self._memory = [kept for kept in self._memory if kept.number != entry.number]

    def close(self) -> None:
        """Leave what waits on disk; where nothing does, leave nothing."""
        empty = self.first() is None
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None
            if empty:
                for suffix in ("", "-wal", "-shm"):
                    with suppress(OSError):
                        self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        if self._lock is not None:
            if empty:
                with suppress(OSError):
                    _lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the spool's lock, or none where a living process holds it."""
    descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def abandoned(directory: Path) -> Iterator[Spool]:
    """Yield the spools in a folder whose agents are gone; each is to be closed."""
    for path in sorted(directory.glob("*.spool")):
        with suppress(OSError, sqlite3.Error):
            held = _locked(path)
            if held is None:
                continue
            os.close(held)
            with sqlite3.connect(path) as database:
                target = database.execute("SELECT url, run FROM target").fetchone()
            database.close()
            if target is not None:
                yield Spool(path, *target)
