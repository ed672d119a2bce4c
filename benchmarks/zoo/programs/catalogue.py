"""Collects the programs of a module with their labels, by decorators above the functions that build them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.zoo.case import Case, Training

Builder = Callable[..., Training]


class Catalogue:
    """The programs of one module."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def healthy(self, steps: int, reaches: float, trap: str, looks_like: str = "") -> Callable[[Builder], Builder]:
        """Label a program healthy; ``looks_like`` names the rule whose fault it resembles from outside."""

        def add(build: Builder) -> Builder:
            self.cases.append(
                Case(name=_name(build), build=build, steps=steps, reaches=reaches, trap=trap, looks_like=looks_like)
            )
            return build

        return add

    def sick(
        self, rule: str, steps: int, reaches: float, trap: str, repair: dict[str, Any], **label: Any
    ) -> Callable[[Builder], Builder]:
        """Label a program sick; called with ``repair`` it is its repaired twin."""

        def add(build: Builder) -> Builder:
            twin = partial(build, **repair)
            case = Case(
                name=_name(build), build=build, twin=twin, rule=rule, steps=steps, reaches=reaches, trap=trap, **label
            )
            self.cases.append(case)
            return build

        return add


def _name(build: Builder) -> str:
    return build.__name__.replace("_", "-")
