"""The spool: what was measured waits here, in order and on disk, until the server has acknowledged it.

One SQLite file for each agent, in WAL mode with full synchronisation, written off the training thread. The file is
owned through a lock beside it, so that the next agent on the machine (or ``gradwatch flush``) can tell what a dead
process left behind. Where the disk cannot be written the spool goes on in memory.
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
from gradwatch.delivery.splitting import values

Kind = Literal["registration", "batch"]

DISK_LIMIT_BYTES: Final = 256 << 20
MEMORY_LIMIT_BYTES: Final = 64 << 20

_SUFFIX: Final = ".spool"
_APPLICATION: Final = 0x67777370
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
    kind: Kind
    samples: int
    body: bytes


class Spool:
    """Documents of one run in the order in which they must be delivered. Safe to use from several threads.

    Args:
        directory: where the file is made.
        url: the server that they are for.
        run: the run's id.
        dropped: counts what is thinned out.
        warn: called once, with the reason, when the disk cannot be used.
        limit_bytes: size over which the oldest samples are thinned.
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
        self._held: int | None = None
        self.path: Path | None = directory / f"{run}-{os.getpid()}-{os.urandom(3).hex()}{_SUFFIX}"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = _own(self.path)
            self._connection = _open(self.path)
            self._connection.execute("INSERT INTO origin VALUES (?, ?)", (url, run))
            self._connection.commit()
        except (OSError, sqlite3.Error) as error:
            self._remove_file()
            self._go_on_in_memory(error, [])
        self._bytes = 0
        self._pending = 0

    @property
    def pending(self) -> int:
        """Return the number of documents that wait."""
        return self._pending

    @property
    def pending_bytes(self) -> int:
        """Return their size."""
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
                self._thin()

    def first(self) -> Entry | None:
        """Return the oldest document, None where nothing waits."""
        with self._lock:
            after = self._acknowledged[-1] if self._acknowledged else 0
            return _first(self._connection, after)

    def forget(self, entry: Entry) -> None:
        """The server has committed ``entry``, or it is given up: it is removed with the next write."""
        with self._lock:
            self._acknowledged.append(entry.number)
            self._pending -= 1
            self._bytes -= len(entry.body)

    def close(self, timeout_seconds: float = -1.0) -> None:
        """Write what is open; an empty spool leaves no file behind.

        Args:
            timeout_seconds: how long a write that is under way is waited for, -1 for ever; the file then stays, for the
                next who finds it when this process is gone.
        """
        if not self._lock.acquire(timeout=timeout_seconds):
            return
        try:
            with suppress(sqlite3.Error):
                self._write(lambda: None)
                self._connection.close()
            if self._pending <= 0:
                self._remove_file()
            self._let_go()
        finally:
            self._lock.release()

    def abandon_after_fork(self) -> None:
        """Let go of the lock file in a forked child, without touching the parent's database."""
        self._let_go()

    def _write(self, change: Callable[[], object]) -> None:
        try:
            change()
            self._clear_acknowledged()
            self._connection.commit()
        except sqlite3.Error as error:
            if self.path is None:
                raise
            self._go_on_in_memory(error, self._rescued())
            change()
            self._connection.commit()

    def _clear_acknowledged(self) -> None:
        # A registration stays as long as the file: who finds it must be able to make the run known again.
        if not self._acknowledged:
            return
        self._connection.executemany(
            "DELETE FROM entry WHERE kind = 'batch' AND number = ?", [(number,) for number in self._acknowledged]
        )
        del self._acknowledged[:-1]

    def _rescued(self) -> list[Entry]:
        after = self._acknowledged[-1] if self._acknowledged else 0
        with suppress(sqlite3.Error):
            self._connection.rollback()
            rows = self._connection.execute("SELECT * FROM entry WHERE number > ? ORDER BY number", (after,)).fetchall()
            return [Entry(*row) for row in rows]
        return []

    def _go_on_in_memory(self, error: Exception, entries: list[Entry]) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._warn(f"the spool {self.path} cannot be used ({reason}); going on in memory, bounded and counted")
        self.path = None
        self._limit_bytes = min(self._limit_bytes, MEMORY_LIMIT_BYTES)
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)
        self._connection.executemany("INSERT INTO entry VALUES (?, ?, ?, ?)", entries)
        after = max([entry.number for entry in entries] + self._acknowledged, default=0)
        self._connection.execute("INSERT INTO sqlite_sequence VALUES ('entry', ?)", (after,))
        self._connection.commit()

    def _thin(self) -> None:
        """Drop every second sample of the older half, until under the limit; trails and events stay while they can."""
        while self._bytes > self._limit_bytes:
            numbers = [
                number
                for (number,) in self._connection.execute(
                    "SELECT number FROM entry WHERE kind = 'batch' AND samples > 0 AND number > ? ORDER BY number",
                    (self._acknowledged[-1] if self._acknowledged else 0,),
                )
            ]
            before = self._bytes
            for number in numbers[1 : max(2, len(numbers) // 2)]:
                self._thin_entry(number)
            if self._bytes == before:
                self._drop_oldest()
            if self._bytes == before:
                break
        self._write(lambda: None)

    def _thin_entry(self, number: int) -> None:
        """Drop every second sample of one batch; of a single one, let the number decide."""
        (body,) = self._connection.execute("SELECT body FROM entry WHERE number = ?", (number,)).fetchone()
        batch = wire.decode(body, wire.Batch)
        kept = [sample for place, sample in enumerate(batch.samples) if (place + number) % 2]
        thinned = msgspec.structs.replace(batch, samples=kept)
        smaller = wire.encode(thinned)
        self._dropped.samples += len(batch.samples) - len(kept)
        self._dropped.bytes += len(body) - len(smaller)
        self._bytes -= len(body) - len(smaller)
        row = (len(kept), smaller, number)
        self._connection.execute("UPDATE entry SET samples = ?, body = ? WHERE number = ?", row)

    def _drop_oldest(self) -> None:
        """Give up whole batches, oldest first, where thinning is not enough."""
        after = self._acknowledged[-1] if self._acknowledged else 0
        rows = self._connection.execute(
            "SELECT number, samples, body FROM entry WHERE kind = 'batch' AND number > ? ORDER BY number LIMIT 64",
            (after,),
        ).fetchall()
        for number, samples, body in rows[1:]:
            if self._bytes <= self._limit_bytes:
                return
            self._connection.execute("DELETE FROM entry WHERE number = ?", (number,))
            lost = Dropped(samples=samples, bytes=len(body), values=values(wire.decode(body, wire.Batch)))
            self._dropped.add(lost)
            self._bytes -= lost.bytes
            self._pending -= 1

    def _remove_file(self) -> None:
        if self.path is None:
            return
        for suffix in ("", "-wal", "-shm", ".lock"):
            with suppress(OSError):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Leftover:
    """The spool that a dead process left behind, owned by this one while it is being delivered."""

    def __init__(self, path: Path, held: int, connection: sqlite3.Connection) -> None:
        self.path = path
        self._held = held
        self._connection = connection
        self._after = 0
        """Number of the last document that was delivered: on a full disk it cannot be removed."""
        row = connection.execute("SELECT url, run FROM origin").fetchone()
        self.url: str = row[0] if row else ""
        self.run: str = row[1] if row else ""

    @property
    def pending(self) -> int:
        """Return the number of documents that wait."""
        # A registration stays as long as the file, as in the spool of an agent.
        query = "SELECT count(*) FROM entry WHERE kind = 'batch' OR number > ?"
        (count,) = self._connection.execute(query, (self._after,)).fetchone()
        return int(count)

    def append(self, kind: Kind, body: bytes) -> None:
        """Put a document at the end."""
        self._connection.execute("INSERT INTO entry (kind, samples, body) VALUES (?, 0, ?)", (kind, body))
        self._connection.commit()

    def first(self) -> Entry | None:
        """Return the oldest document, None where nothing waits."""
        return _first(self._connection, self._after)

    def forget(self, entry: Entry) -> None:
        """Remove ``entry``; what cannot be removed is sent again by the next who finds it, and stored once."""
        self._after = entry.number
        try:
            self._connection.execute("DELETE FROM entry WHERE kind = 'batch' AND number = ?", (entry.number,))
            self._connection.commit()
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                self._connection.rollback()

    def close(self) -> None:
        """Let go; an empty spool leaves no file behind."""
        empty = False
        with suppress(sqlite3.Error):
            empty = not self.pending
        with suppress(sqlite3.Error):
            self._connection.close()
        if empty:
            for suffix in ("", "-wal", "-shm", ".lock"):
                with suppress(OSError):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        os.close(self._held)


@contextmanager
def _owned(path: Path) -> Iterator[Leftover | None]:
    held = None
    try:
        held = _own(path)
        leftover = Leftover(path, held, _reopen(path))
    except (OSError, sqlite3.Error):
        if held is not None:
            if not path.exists():  # delivered and removed meanwhile
                Path(f"{path}.lock").unlink(missing_ok=True)
            os.close(held)
        yield None
        return
    try:
        yield leftover
    finally:
        leftover.close()


def leftovers(directory: Path) -> Iterator[Leftover]:
    """Yield each spool in ``directory`` that no living process owns, oldest first; the next lets go of it."""
    try:
        paths = list(directory.glob(f"*{_SUFFIX}"))
    except OSError:
        return
    for path in sorted(paths, key=_written_at):
        with _owned(path) as leftover:
            if leftover is not None:
                yield leftover


def _written_at(path: Path) -> float:
    """Return when a file was last written; 0 where another process has delivered and removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _own(path: Path) -> int:
    """Take the lock beside ``path`` and return its descriptor; the system lets go of it when the process dies.

    Raises:
        OSError: another process owns it, or the folder cannot be written.
    """
    held = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _open(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, check_same_thread=False, timeout=5)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.executescript(_SCHEMA)
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    return connection


def _reopen(path: Path) -> sqlite3.Connection:
    """Open a spool that is there.

    Raises:
        sqlite3.Error: the file is somebody else's; it is not touched.
    """
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, check_same_thread=False, timeout=5)
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != _APPLICATION:
        connection.close()
        raise sqlite3.DatabaseError(f"{path} is not a spool")
    return connection


def _first(connection: sqlite3.Connection, after: int) -> Entry | None:
    query = "SELECT number, kind, samples, body FROM entry WHERE number > ? ORDER BY number LIMIT 1"
    row = connection.execute(query, (after,)).fetchone()
    return Entry(*row) if row else None
