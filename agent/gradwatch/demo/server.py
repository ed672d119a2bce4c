"""The server of the demonstration: ``gradwatch serve`` as a child process, restarted if it dies."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import urllib3

_PORTS = (8321, 0)
_START_SECONDS = 20.0
_RESTART_SECONDS = 1.0


class Server:
    """A running ``gradwatch serve`` with an SQLite database; a context manager that stops it.

    Args:
        folder: folder of the database and the log.
        webhook: address of the webhook receiver.
        secret: key of the webhook signatures.
    """

    def __init__(self, folder: Path, webhook: str, secret: str) -> None:
        self._log = folder / "server.log"
        database = f"sqlite:///{folder / 'gradwatch.db'}"
        self._command = [sys.executable, "-m", "gradwatch", "serve", "--database-url", database]
        self._command += ["--webhook", webhook, "--webhook-secret", secret]
        self._http = urllib3.PoolManager(timeout=2.0, retries=False)
        self._closing = threading.Event()
        self._process, self.url = self._begin()
        self._command += ["--port", self.url.rpartition(":")[2]]
        self._watch = threading.Thread(target=self._keep_alive, name="demo-server", daemon=True)

    def __enter__(self) -> Self:
        self._wait_until_ready()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._watch.join()
        self._process.terminate()
        self._process.wait()

    def wait(self) -> None:
        """Wait until the server ends."""
        self._watch.join()

    def _begin(self) -> tuple[subprocess.Popen[bytes], str]:
        """Start the server on the usual port, or on a free one if that is taken; return the process and its address."""
        for port in _PORTS:
            with self._log.open("ab") as log:
                process = subprocess.Popen([*self._command, "--port", str(port)], stdout=subprocess.PIPE, stderr=log)
            assert process.stdout is not None
            with process.stdout as announced:
                words = announced.readline().decode().split()
            if words[:3] == ["gradwatch", "serves", "on"]:
                return process, words[3]
            process.wait()
        raise RuntimeError(f"the server did not start; its log: {self._log.read_text()}")

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def _ready(self) -> bool:
        try:
            return self._http.request("GET", f"{self.url}/readyz").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; its log: {self._log.read_text()}")
            time.sleep(0.05)

    def _keep_alive(self) -> None:
        """Restart the server if it has died, unless somebody else has started one on its port."""
        while not self._closing.wait(0.2):
            if self._process.poll() is None:
                continue
            print(f"\n  the server has died (exit code {self._process.returncode}); starting it again", flush=True)
            if self._closing.wait(_RESTART_SECONDS):
                return
            while self._ready():
                if self._closing.wait(1.0):
                    return
            self._process = self._start()
