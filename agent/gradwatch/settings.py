"""Settings of the agent: the arguments of ``attach`` first, then the environment, then the defaults."""

import math
import operator
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

DEFAULT_URL: Final = "http://127.0.0.1:8321"
LONGEST_NAME: Final = 512
"""Longest name of a project, run or scalar in characters, as a server takes it by default."""
RUN_ID: Final = re.compile(r"run-[0-9a-f]{16}")
"""The form of a run's id. ``run=`` in this form resumes that run as a new attempt; anything else is a name."""

RUN_TAKEN: Final = "GRADWATCH_RUN_TAKEN"
"""Variable that tells child processes which run their parent has taken over, and its process id."""

_T = TypeVar("_T")


class SettingsError(ValueError):
    """An argument or environment variable that cannot be used; the text names it, its value and what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one agent, checked when they are made."""

    url: str = DEFAULT_URL
    token: str | None = field(default=None, repr=False)
    project: str = "default"
    run: str | None = None
    resume_seconds: float = 5.0
    """Longest wait for each of the two answers by which an interrupted job finds its run; 0: it is not looked for."""
    training_name: str = ""
    """Name of the training within its job: that of the run, without the time."""
    every_steps: int | None = None
    """Steps between samples; None: as ``overhead_budget_ratio`` allows."""
    overhead_budget_ratio: float = 0.01
    """Largest share of the step time that the agent may take."""
    step: int | None = None
    """Optimizer steps made so far; None: the optimizers are asked."""
    spool_directory: Path
    """Folder in which unsent measurements wait."""
    step_log: Path | None = None
    """File that takes the events of the training, so that they can be replayed; None: nothing is written."""

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_url()
        self._check_numbers()

    def _check_texts(self) -> None:
        for name, text in (("url", self.url), ("project", self.project), ("run", self.run), ("token", self.token)):
            if text is not None and not isinstance(text, str):
                raise SettingsError(f"{name}={'...' if name == 'token' else repr(text)[:80]} must be a text")
        for name, text in (("project", self.project), ("run", self.run or "")):
            if len(text) > LONGEST_NAME or not can_be_stored(text):
                raise SettingsError(f"{name}={text[:40]!r}... must have at most {LONGEST_NAME} characters, and no NUL")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise SettingsError("the token holds a character that no HTTP header may: see token=, GRADWATCH_TOKEN")

    def _check_url(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SettingsError(f"url {self.url!r} must start with http:// or https://")
        if not _names_a_host(self.url):
            raise SettingsError(
                f"url {self.url!r} must name a host, and a port from 1 to 65535 or none: http://127.0.0.1:8321"
            )

    def _check_numbers(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise SettingsError(f"every={self.every_steps} must be at least 1 step, or None to let the budget decide")
        if not isinstance(self.overhead_budget_ratio, int | float):
            raise SettingsError(f"overhead_budget={self.overhead_budget_ratio!r:.80} must be a number (0.01 is 1%)")
        if not 0 < self.overhead_budget_ratio <= 1 or math.isnan(self.overhead_budget_ratio):
            raise SettingsError(
                f"overhead_budget={self.overhead_budget_ratio} must be over 0 and at most 1 (0.01 is 1%)"
            )
        if self.step is not None and self.step < 0:
            raise SettingsError(f"step={self.step} must be the number of steps made so far, 0 or more, or None")


def resolve(
    *,
    url: str | None = None,
    token: str | None = None,
    project: str | None = None,
    run: str | None = None,
    every: int | None = None,
    overhead_budget: float = 0.01,
    step: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings for these arguments, completed from the environment where an argument is None.

    Raises:
        SettingsError: a value cannot be used.
    """
    given = os.environ if environment is None else environment
    return Settings(
        url=_stripped(url or given.get("GRADWATCH_URL") or DEFAULT_URL, "/"),
        token=_stripped(token or secret(given, "GRADWATCH_TOKEN")),
        project=project or given.get("GRADWATCH_PROJECT") or "default",
        run=run or _given_run(given),
        resume_seconds=_seconds("GRADWATCH_RESUME_SECONDS", given.get("GRADWATCH_RESUME_SECONDS"), 5.0),
        training_name=str(run or _given_run(given) or ""),
        every_steps=_steps(given.get("GRADWATCH_EVERY")) if every is None else _whole("every", every),
        overhead_budget_ratio=overhead_budget,
        step=None if step is None else _whole("step", step),
        spool_directory=spool_directory(given),
        step_log=Path(given["GRADWATCH_STEP_LOG"]).absolute() if given.get("GRADWATCH_STEP_LOG") else None,
    )


def _given_run(given: Mapping[str, str]) -> str | None:
    """Return the run that the environment names; an id belongs to the process that took it, not to its children."""
    run = given.get("GRADWATCH_RUN") or None
    taken = given.get(RUN_TAKEN)
    if run is not None and RUN_ID.fullmatch(run) and taken not in (None, f"{run} {os.getpid()}"):
        return None
    return run


def secret(environment: Mapping[str, str], name: str) -> str | None:
    """Return the secret in ``name``, or in the file that ``name_FILE`` names."""
    if environment.get(name):
        return environment[name]
    path = environment.get(f"{name}_FILE")
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError as error:
        raise SettingsError(f"{name}_FILE={path} cannot be read: {error.strerror}") from None


def spool_directory(environment: Mapping[str, str]) -> Path:
    """Return the folder of the spool: ``GRADWATCH_SPOOL_DIR``, else a folder in the user's cache directory.

    For a user without a home (a container that runs under any uid) it is a temporary folder.
    """
    if environment.get("GRADWATCH_SPOOL_DIR"):
        named = os.path.expanduser(environment["GRADWATCH_SPOOL_DIR"])  # noqa: PTH111 -- Path.expanduser raises without a home
        return Path(named).absolute()  # the program may change its working directory later
    cache = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path("~/.cache").expanduser()) / "gradwatch"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"gradwatch-{os.getuid()}"


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        return False


def _stripped(text: _T, also: str = "") -> _T:
    """Return a text without white space around it and without the characters ``also`` at its end."""
    return cast("_T", text.strip().rstrip(also)) if isinstance(text, str) else text


def can_be_stored(text: str) -> bool:
    """Return whether a database can store a text: it has no NUL and no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _whole(name: str, steps: Any) -> int:
    """Return a number of steps as an int; one from a checkpoint may be numpy's, a tensor or a float.

    Raises:
        SettingsError: it is not a whole number.
    """
    try:
        return operator.index(steps)
    except TypeError:
        with suppress(TypeError, ValueError, RuntimeError):
            if not isinstance(steps, str) and float(steps).is_integer():
                return int(float(steps))
    raise SettingsError(f"{name}={steps!r:.80} must be a whole number of steps, or None")


def _steps(text: str | None) -> int | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"GRADWATCH_EVERY={text!r} must be a whole number of steps") from None


def _seconds(name: str, text: str | None, default: float) -> float:
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise SettingsError(f"{name}={text!r:.80} must be a number of seconds, 0 or more")
    return seconds
