"""``gradwatch serve``: runs the server until it is told to stop."""

import argparse
import asyncio
import ctypes
import errno
import gc
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import cast

import msgspec
import sqlalchemy as sa
import uvicorn

from gradwatch.settings import secret
from gradwatch_server.api.connections import ConnectionTable, raise_file_limit
from gradwatch_server.app import create_app
from gradwatch_server.errors import ConfigurationError, GradwatchError
from gradwatch_server.notify.http_client import ALL_NETWORKS, is_loopback
from gradwatch_server.notify.receivers import Webhook
from gradwatch_server.plain_text import visible
from gradwatch_server.services import Services
from gradwatch_server.settings import DATABASE_URL_HELP, Configuration, Settings, resolve_database_url
from gradwatch_server.store.database import open_engine, prepare, shown_address
from gradwatch_server.store.tokens import count_tokens
from gradwatch_server.telemetry import logs

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
"""How long one thread keeps the interpreter while another waits for it. In Python's 5 ms the writer stores some small
batches, and it gives the interpreter up, and waits for it again, a few times in each of them.
"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Options of glibc's ``mallopt``, see malloc.h."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwatch serve", description="Run the server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8321, help="port to listen on; 0: any free one (default: 8321)")
    parser.add_argument("--database-url", metavar="URL", help=DATABASE_URL_HELP)
    parser.add_argument("--webhook", metavar="URL", help="deliver every alert to this address")
    parser.add_argument("--webhook-secret", metavar="whsec_...", help="sign what is delivered there")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration, see docs/configuration.md")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 0 to 65535")
    return int(text)


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings of the command line, the environment and the configuration file.

    Raises:
        ConfigurationError: one of them is wrong; the text names it.
    """
    configuration = Configuration() if arguments.config is None else Configuration.load(arguments.config)
    if arguments.webhook is not None:
        signed_with = arguments.webhook_secret or secret(os.environ, "GRADWATCH_WEBHOOK_SECRET")
        try:
            receiver = Webhook(
                name="webhook", url=arguments.webhook, secret=signed_with, allow_networks=[*ALL_NETWORKS]
            )
            configuration = msgspec.structs.replace(configuration, receivers=[*configuration.receivers, receiver])
        except ValueError as error:
            raise ConfigurationError(f"--webhook: {error}") from None
    elif arguments.webhook_secret is not None:
        raise ConfigurationError("--webhook-secret signs what --webhook delivers: give --webhook URL as well")
    public_url = os.environ.get("GRADWATCH_PUBLIC_URL")
    if public_url:
        try:
            configuration = msgspec.structs.replace(configuration, public_url=public_url)
        except ValueError as error:
            raise ConfigurationError(f"GRADWATCH_PUBLIC_URL: {error}") from None
    database_url = resolve_database_url(arguments.database_url)
    return Settings(database_url=database_url, host=arguments.host, port=arguments.port, configuration=configuration)


class _Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown and a reload of the configuration.

    After SIGINT or SIGTERM it finishes all work that it has accepted and exits with 0; at SIGHUP it reads its
    configuration. A signal may come in the middle of anything, so its handler only sets a flag; the event loop acts on
    it, between two callbacks.
    """

    def __init__(self, config: uvicorn.Config, read_configuration: Callable[[], Configuration]) -> None:
        super().__init__(config)
        self._read_configuration = read_configuration
        self._reload_wanted = False
        self._reloading: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have the event loop handle the signals, and do not raise them again afterwards, as uvicorn does."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # the process is about to end, with the exit code of its work

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; if SIGHUP came in the meantime, reload the configuration."""
        await super().startup(sockets)
        if self._reload_wanted:
            self.reload()

    def want_reload(self, *_: object) -> None:
        """Remember that SIGHUP came: the handler as long as there is no event loop."""
        self._reload_wanted = True

    def reload(self) -> None:
        """Begin to reload the configuration, or have the reload that is under way followed by another one."""
        self._reload_wanted = True
        if self._reloading is None and self._services is not None:
            self._reloading = asyncio.create_task(self._reload(self._services))

    @property
    def _services(self) -> Services | None:
        """The services; None until they have been started."""
        services: Services | None = getattr(self.config.app.state, "services", None)  # type: ignore[union-attr]
        return services

    async def _reload(self, services: Services) -> None:
        """Reload the configuration as often as that is wanted; if anything is wrong, keep the previous one."""
        while self._reload_wanted:
            self._reload_wanted = False
            try:
                services.reload(await asyncio.to_thread(self._read_configuration))
            except Exception as error:  # whatever is wrong with the files must not end the server, nor this task
                log.error("reload failed, keeping the previous configuration: %s", error)  # noqa: TRY400
            else:
                log.info("configuration reloaded")
        self._reloading = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin a graceful shutdown at the first signal; stop at once at the second."""
        services = self._services
        if services is None or not services.ready:
            super().handle_exit(sig, frame)
            return
        services.begin_shutdown()
        self._drain(services, sig, frame)

    def _drain(self, services: Services, sig: int, frame: FrameType | None) -> None:
        """Go on answering until all accepted work is on disk; the readiness probe answers "not ready" meanwhile."""

        async def drain() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(services.settings.configuration.limits.drain_seconds):
                    await services.byte_budget.wait_idle()
            super(_Server, self).handle_exit(sig, frame)

        self._draining = asyncio.create_task(drain())


def _check_open(host: str, engine: sa.Engine) -> None:
    """Refuse to listen to other machines as long as no token is required."""
    if is_loopback(host):
        return
    with engine.connect() as connection:
        if count_tokens(connection):
            return
    raise ConfigurationError(
        f"--host {host} lets other machines in, and this server has no token: make one with "
        "gradwatch token create --scope admin (with the same database), or listen on 127.0.0.1"
    )


def _listen(settings: Settings) -> socket.socket:
    try:
        return socket.create_server(
            (settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        )
    except OSError as error:
        address, option = f"{settings.host}:{settings.port}", "--port"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            option = "--host"
        text = f"cannot listen on {address}: {error.strerror}; choose another with {option}"
        raise ConfigurationError(text) from None


def _keep_memory() -> None:
    """Have glibc keep up to 64 MB of freed memory for the next answers: without it every map takes a third longer."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**26)):
        libc.mallopt(option, value)


def main(arguments: Sequence[str]) -> int:
    """Run the server until it is told to stop; return the exit code."""
    _keep_memory()
    logs.set_up()
    try:
        given = _parser().parse_args(arguments)
        settings = read_settings(given)
        engine = open_engine(settings.database_url)
        prepare(engine)
        _check_open(settings.host, engine)
        sock = _listen(settings)
    except (GradwatchError, ValueError) as error:
        print(visible(f"gradwatch serve: {error}", keep="\n\t"), file=sys.stderr)
        return 1
    host, port = sock.getsockname()[:2]
    settings = msgspec.structs.replace(settings, host=host, port=port)
    app = create_app(settings, engine)
    table = ConnectionTable(lambda: cast("Services", app.state.services).settings.configuration)
    raise_file_limit(settings.configuration.connections.most)
    server = _Server(
        uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", table),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        ),
        lambda: read_settings(given).configuration,
    )
    signal.signal(signal.SIGHUP, server.want_reload)  # before the line is printed after which it may be sent
    print(f"gradwatch serves on {settings.address} (database {shown_address(engine)})", flush=True)
    if settings.public_url != settings.address.rstrip("/"):
        print(f"links lead to {settings.public_url}; public_url is where people reach the page", flush=True)
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()  # what is loaded at the start need not be traversed at every collection
    gc.set_threshold(20_000, 20, 20)
    server.run(sockets=[sock])
    engine.dispose()
    return 0
