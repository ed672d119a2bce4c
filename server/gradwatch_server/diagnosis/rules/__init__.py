"""The rules of the diagnosis. Each module of this folder is one rule and exports it as ``RULE``."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gradwatch_server.diagnosis.rule import Observation, Rule

RULES: tuple[Rule[Any, Any], ...] = tuple(
    import_module(f"{__name__}.{name}").RULE for name in sorted(module.name for module in iter_modules(__path__))
)
"""All rules, in the alphabetical order of their names."""

SAMPLE_RULES: tuple[Rule[Observation, Any], ...] = tuple(rule for rule in RULES if rule.subject is Observation)
"""The rules that look at samples and blame parameters."""
