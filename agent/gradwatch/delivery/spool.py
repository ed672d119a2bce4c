"""The spool: a queue of documents on disk, in order, which keeps them until the server has acknowledged them.

One SQLite file for each agent, in WAL mode with full synchronisation, written off the training thread. A lock file
beside it shows whether its process lives, so that the next agent on the machine (or ``gradwatch flush``) finds what a
dead process left. If the disk cannot be written, the spool goes on in memory.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.host_clock import clock_id
from gradwatch.delivery.splitting import count_values

Kind = Literal["registration", "batch"]

DISK_LIMIT_BYTES: Final = 256 << 20
MEMORY_LIMIT_BYTES: Final = 64 << 20

_SUFFIX: Final = ".spool"
_APPLICATION_ID: Final = 0x67777370
"""Marks an SQLite file as a spool: no other file in the folder is ever touched."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS origin (url TEXT NOT NULL, run TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, samples INTEGER NOT NULL, body BLOB NOT NULL
);
"""


class Entry(NamedTuple):
    """One document that waits for the server."""

    number: int
    """Place in the queue."""
    kind: Kind
    samples: int
    """Number of samples in it."""
    body: bytes


class Spool:
    """Documents of one run in the order in which they must be delivered. Safe to use from several threads.

    Args:
        directory: folder of the file.
        url: the server that the documents are for.
        run: id of the run.
        dropped: counts the samples that are dropped to stay under the limit.
        warn: called once, with the reason, if the disk cannot be used.
        limit_bytes: size over which samples are dropped, every second one of the older half first.
    """

    def __init__(
        self,
        directory: Path,
        *,
        url: str,
        run: str,
        dropped: Dropped,
        warn: Callable[[str], None],
        limit_bytes: int = DISK_LIMIT_BYTES,
    ) -> None:
        self.run = run
        self._dropped = dropped
        self._warn = warn
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._acknowledged: list[int] = []
        """Numbers of entries that are to be deleted; the last number stays, and every entry up to it is done."""
        self._lock_file: int | None = None
        self.path: Path | None = directory / f"{run}-{os.getpid()}-{os.urandom(3).hex()}{_SUFFIX}"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = _lock_file_of(self.path)
            self._connection = _create(self.path)
            self._connection.execute("INSERT INTO origin VALUES (?, ?)", (url, run))
            self._connection.commit()
        except (OSError, sqlite3.Error) as error:
            self._remove_file()
            self._move_to_memory(error, [])
        self._bytes = 0
        self._pending = 0

    @property
    def pending(self) -> int:
        """Return the number of documents that wait."""
        return self._pending

    @property
    def pending_bytes(self) -> int:
        """Return the size of the documents that wait."""
        return self._bytes

    def append(self, kind: Kind, body: bytes, samples: int = 0) -> None:
        """Put a document at the end; it is on disk when this returns."""
        with self._lock:
            row = (kind, samples, body)
            self._write(
                lambda: self._connection.execute("INSERT INTO entry (kind, samples, body) VALUES (?, ?, ?)", row)
            )
            self._pending += 1
            self._bytes += len(body)
            if self._bytes > self._limit_bytes:
                self._shrink()

    def first(self) -> Entry | None:
        """Return the oldest document, None if none waits."""
        with self._lock:
            return _first_after(self._connection, self._last_acknowledged)

    def last(self) -> Entry | None:
        """Return the newest document, None if none waits."""
        query = "SELECT number, kind, samples, body FROM entry WHERE number > ? ORDER BY number DESC LIMIT 1"
        with self._lock:
            row = self._connection.execute(query, (self._last_acknowledged,)).fetchone()
        return Entry(*row) if row else None

    def forget(self, entry: Entry) -> None:
        """Remove a document that was committed or given up; it is deleted from the file with the next write."""
        with self._lock:
            self._acknowledged.append(entry.number)
            self._pending -= 1
            self._bytes -= len(entry.body)

    def close(self, timeout_seconds: float = -1.0) -> None:
        """Finish all writes and close the file; delete it if no document waits.

        Args:
            timeout_seconds: longest wait for a write that is under way, -1 for ever. If it takes longer, the file stays
                for the next agent, which finds it when this process has ended.
        """
        if not self._lock.acquire(timeout=timeout_seconds):
            return
        try:
            with suppress(sqlite3.Error):
                self._write(lambda: None)
                self._connection.close()
            if self._pending <= 0:
                self._remove_file()
            self._release_lock_file()
        finally:
            self._lock.release()

    def abandon_after_fork(self) -> None:
        """Close the lock file in a forked child, without touching the parent's database."""
        self._release_lock_file()

    @property
    def _last_acknowledged(self) -> int:
        return self._acknowledged[-1] if self._acknowledged else 0

    def _write(self, change: Callable[[], object]) -> None:
        try:
            change()
            self._delete_acknowledged()
            self._connection.commit()
        except sqlite3.Error as error:
            if self.path is None:
                raise
            self._move_to_memory(error, self._rescued_entries())
            change()
            self._connection.commit()

    def _delete_acknowledged(self) -> None:
        # A registration stays as long as the file: whoever finds the file must be able to register the run again.
        if not self._acknowledged:
            return
        self._connection.executemany(
            "DELETE FROM entry WHERE kind = 'batch' AND number = ?", [(number,) for number in self._acknowledged]
        )
        del self._acknowledged[:-1]

    def _rescued_entries(self) -> list[Entry]:
        """Return the documents that can still be read from a file that cannot be written."""
        with suppress(sqlite3.Error):
            self._connection.rollback()
            query = "SELECT * FROM entry WHERE number > ? ORDER BY number"
            return [Entry(*row) for row in self._connection.execute(query, (self._last_acknowledged,)).fetchall()]
        return []

    def _move_to_memory(self, error: Exception, entries: list[Entry]) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._warn(f"the spool {self.path} cannot be used ({reason}); going on in memory, bounded and counted")
        self.path = None
        self._limit_bytes = min(self._limit_bytes, MEMORY_LIMIT_BYTES)
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)
        self._connection.executemany("INSERT INTO entry VALUES (?, ?, ?, ?)", entries)
        last = max([entry.number for entry in entries] + self._acknowledged, default=0)
        self._connection.execute("INSERT INTO sqlite_sequence VALUES ('entry', ?)", (last,))
        self._connection.commit()

    def _shrink(self) -> None:
        """Get under the size limit: drop every second sample of the older half, then whole batches, oldest first."""
        while self._bytes > self._limit_bytes:
            query = "SELECT number FROM entry WHERE kind = 'batch' AND samples > 0 AND number > ? ORDER BY number"
            numbers = [number for (number,) in self._connection.execute(query, (self._last_acknowledged,))]
            before = self._bytes
            for number in numbers[1 : max(2, len(numbers) // 2)]:
                self._drop_every_second_sample(number)
            if self._bytes == before:
                self._drop_oldest()
            if self._bytes == before:
                break
        self._write(lambda: None)

    def _drop_every_second_sample(self, number: int) -> None:
        """Drop every second sample of one batch; of batches with a single sample, drop every second batch's."""
        (body,) = self._connection.execute("SELECT body FROM entry WHERE number = ?", (number,)).fetchone()
        batch = wire.read_back(body)
        kept = [sample for place, sample in enumerate(batch.samples) if (place + number) % 2]
        smaller = wire.encode(msgspec.structs.replace(batch, samples=kept))
        self._dropped.samples += len(batch.samples) - len(kept)
        self._dropped.bytes += len(body) - len(smaller)
        self._bytes -= len(body) - len(smaller)
        row = (len(kept), smaller, number)
        self._connection.execute("UPDATE entry SET samples = ?, body = ? WHERE number = ?", row)

    def _drop_oldest(self) -> None:
        query = "SELECT number, samples, body FROM entry WHERE kind = 'batch' AND number > ? ORDER BY number LIMIT 64"
        rows = self._connection.execute(query, (self._last_acknowledged,)).fetchall()
        for number, samples, body in rows[1:]:  # the first one may be on its way
            if self._bytes <= self._limit_bytes:
                return
            self._connection.execute("DELETE FROM entry WHERE number = ?", (number,))
            values = count_values(wire.read_back(body))
            self._dropped.add(Dropped(samples=samples, bytes=len(body), values=values))
            self._bytes -= len(body)
            self._pending -= 1

    def _remove_file(self) -> None:
        if self.path is not None:
            _remove_files(self.path)

    def _release_lock_file(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


class Leftover:
    """The spool of a dead process, locked by this process while it is delivered."""

    def __init__(self, path: Path, lock_file: int, connection: sqlite3.Connection) -> None:
        self.path = path
        self._lock_file = lock_file
        self._connection = connection
        self._last_delivered = 0
        """Number of the last document that was delivered; on a full disk it cannot be deleted."""
        row = connection.execute("SELECT url, run FROM origin").fetchone()
        self.url: str = row[0] if row else ""
        self.run: str = row[1] if row else ""
        self.has_this_clock = connection.execute("PRAGMA user_version").fetchone()[0] == clock_id()
        """Whether it was written by a process with this one's clock; a folder may be shared by several machines."""

    @property
    def pending(self) -> int:
        """Return the number of documents that wait."""
        # A registration stays as long as the file, as in the spool of an agent.
        query = "SELECT count(*) FROM entry WHERE kind = 'batch' OR number > ?"
        (count,) = self._connection.execute(query, (self._last_delivered,)).fetchone()
        return int(count)

    def append(self, kind: Kind, body: bytes) -> None:
        """Put a document at the end."""
        self._connection.execute("INSERT INTO entry (kind, samples, body) VALUES (?, 0, ?)", (kind, body))
        self._connection.commit()

    def first(self) -> Entry | None:
        """Return the oldest document, None if none waits."""
        return _first_after(self._connection, self._last_delivered)

    def forget(self, entry: Entry) -> None:
        """Remove a document. If it cannot be deleted, the next process sends it again and the server stores it once."""
        self._last_delivered = entry.number
        try:
            self._connection.execute("DELETE FROM entry WHERE kind = 'batch' AND number = ?", (entry.number,))
            self._connection.commit()
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                self._connection.rollback()

    def close(self) -> None:
        """Close and unlock the file; delete it if no document waits."""
        empty = False
        with suppress(sqlite3.Error):
            empty = not self.pending
        with suppress(sqlite3.Error):
            self._connection.close()
        if empty:
            _remove_files(self.path)
        os.close(self._lock_file)


def leftovers(directory: Path) -> Iterator[Leftover]:
    """Yield the spools in ``directory`` that no living process owns, oldest first; each is closed before the next."""
    try:
        paths = list(directory.glob(f"*{_SUFFIX}"))
    except OSError:
        return
    for path in sorted(paths, key=_modified_at):
        with _lock_leftover(path) as leftover:
            if leftover is not None:
                yield leftover


@contextmanager
def _lock_leftover(path: Path) -> Iterator[Leftover | None]:
    """Open the spool of a dead process; None if a living process owns it, or if the file is not a spool."""
    lock_file = None
    try:
        lock_file = _lock_file_of(path)
        leftover = Leftover(path, lock_file, _open(path))
    except (OSError, sqlite3.Error):
        if lock_file is not None:
            if not path.exists():  # delivered and removed by another process meanwhile
                Path(f"{path}.lock").unlink(missing_ok=True)
            os.close(lock_file)
        yield None
        return
    try:
        yield leftover
    finally:
        leftover.close()


def _modified_at(path: Path) -> float:
    """Return when a file was last written, in Unix seconds; 0 if another process has removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _lock_file_of(path: Path) -> int:
    """Lock the file beside ``path`` and return its descriptor; the lock ends with the process.

    Raises:
        OSError: another process holds the lock, or the folder cannot be written.
    """
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _create(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, check_same_thread=False, timeout=5)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.executescript(_SCHEMA)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {clock_id()}")
    return connection


def _open(path: Path) -> sqlite3.Connection:
    """Open an existing spool.

    Raises:
        sqlite3.Error: the file is no spool; it is not touched.
    """
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, check_same_thread=False, timeout=5)
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != _APPLICATION_ID:
        connection.close()
        raise sqlite3.DatabaseError(f"{path} is not a spool")
    return connection


def _remove_files(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", ".lock"):
        with suppress(OSError):
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _first_after(connection: sqlite3.Connection, number: int) -> Entry | None:
    query = "SELECT number, kind, samples, body FROM entry WHERE number > ? ORDER BY number LIMIT 1"
    row = connection.execute(query, (number,)).fetchone()
    return Entry(*row) if row else None
