"""The rules of the diagnosis, their limits that are in force for a run, and the diagnosis of a sample by all of them.

Each module of this folder is one rule and exports it as ``RULE``. The limits are the defaults of the rules with the
changes of ``[rules.NAME]``.
"""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Self, cast

import msgspec
import numpy as np

from gradwatch_server.diagnosis.finding import Finding
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.rule import Limits, LimitsT, Observation, Rule
from gradwatch_server.diagnosis.run_parameters import RunParameters
from gradwatch_server.diagnosis.sample import Sample

RULES: tuple[Rule[Any, Any], ...] = tuple(
    import_module(f"{__name__}.{name}").RULE for name in sorted(module.name for module in iter_modules(__path__))
)
"""All rules, in the alphabetical order of their names."""

SAMPLE_RULES: tuple[Rule[Observation, Any], ...] = tuple(rule for rule in RULES if rule.subject is Observation)
"""The rules that look at samples and blame parameters."""

_PLACES = {rule.name: place for place, rule in enumerate(RULES)}
_DEFAULTS = tuple(rule.limits() for rule in RULES)


@dataclass(frozen=True)
class Thresholds:
    """The limits of all rules: ``thresholds[RULE]`` are those of one rule."""

    limits: tuple[Limits, ...] = _DEFAULTS
    """In the order of ``RULES``."""

    def __getitem__(self, rule: Rule[Any, LimitsT]) -> LimitsT:
        return cast("LimitsT", self.limits[_PLACES[rule.name]])

    @classmethod
    def from_table(cls, table: dict[str, dict[str, Any]]) -> Self:
        """Return the limits with the changes of a configuration table.

        Raises:
            ValueError: a rule, a key or a value is not valid; the text names it and its value, and says what to do.
        """
        limits = list(_DEFAULTS)
        for name, changes in table.items():
            if name not in _PLACES:
                raise ValueError(f"rules.{name}: there is no such rule; the rules are {', '.join(sorted(_PLACES))}")
            place = _PLACES[name]
            _check(name, RULES[place].limits, changes)
            limits[place] = msgspec.convert(changes, RULES[place].limits)
        return cls(tuple(limits))


def _check(rule: str, limits: type[Limits], changes: object) -> None:
    if not isinstance(changes, dict):
        raise ValueError(  # noqa: TRY004  # everything wrong with a configuration is one kind of error
            f"rules.{rule} = {changes!r}: a table of thresholds, such as [rules.{rule}] enabled = false"
        )
    fields = {field.name: field for field in msgspec.structs.fields(limits)}
    for key, value in changes.items():
        if key not in fields:
            raise ValueError(f"rules.{rule}.{key}: there is no such key; the keys are {', '.join(sorted(fields))}")
        try:
            msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            detail = str(error)[:1].lower() + str(error)[1:]
            default = fields[key].default
            raise ValueError(f"rules.{rule}.{key} = {value!r}: {detail}; the default is {default!r}") from None


def diagnose(
    parameters: RunParameters, history: History, sample: Sample, thresholds: Thresholds
) -> tuple[History, list[Finding]]:
    """Diagnose one sample of a run.

    Args:
        parameters: the run's parameters.
        history: the history of the run's earlier samples.
        sample: the sample; steps ascend within an attempt.
        thresholds: the limits in force.

    Returns:
        The history with this sample in it, and one finding for each rule that holds at the sample.
    """
    with np.errstate(all="ignore"):
        observation = Observation.of(parameters, history, sample)
        found = ((rule, rule.find(observation, thresholds[rule])) for rule in SAMPLE_RULES)
        symptoms = {rule: symptom for rule, symptom in found if symptom is not None}
        reports = (rule.report(symptom, thresholds[rule], history.since) for rule, symptom in symptoms.items())
        findings = [finding for finding in reports if finding is not None]
        rules = [finding.rule for finding in findings]
        # A sign of an explosion counts for the history even where the rule is not enabled.
        suspect = any(rule.name == "exploding" for rule in symptoms)
        times = observation.quiet_times, observation.still_times, observation.slow_steps
        after = history.after(sample, observation.profile, *times, rules, suspect=suspect)
        return after, findings
