"""Runs with planted faults, sent to a server as an agent would: what the page is looked at with.

``python -m tests.page.planted http://127.0.0.1:8321`` fills a server for looking around.
"""

import sys
import time
from dataclasses import dataclass, field

import httpx
import numpy as np
from numpy.typing import NDArray

from gradwatch import wire

SPIKE_STEP, SPIKE_PARAMETER = 137, "blocks.3.conv2.weight"
INFINITE_STEP, INFINITE_PARAMETER = 300, "blocks.1.conv1.weight"
NAN_STEP, NAN_PARAMETER = 420, "head.weight"
ZERO_STEPS, ZERO_PARAMETER = range(200, 350), "blocks.5.norm.bias"
MISSING_PARAMETER = "aux.weight"
LIMIT_STEPS, LIMITS = (0, 250, 500), (0.3, 0.6, float("inf"))
"""The whole gradient is clipped to each of the limits from its step on."""


def residual_net(blocks: int = 8) -> list[wire.Parameter]:
    """Return the parameters of a small residual net."""
    listed = [wire.Parameter("stem.weight", [32, 3, 3, 3], units=32, kind="Conv2d")]
    for block in range(blocks):
        prefix = f"blocks.{block}"
        listed += [
            wire.Parameter(f"{prefix}.norm.weight", [32], kind="BatchNorm2d"),
            wire.Parameter(f"{prefix}.norm.bias", [32], kind="BatchNorm2d"),
            wire.Parameter(f"{prefix}.conv1.weight", [32, 32, 3, 3], units=32, kind="Conv2d"),
            wire.Parameter(f"{prefix}.conv2.weight", [32, 32, 3, 3], units=32, kind="Conv2d"),
        ]
    listed += [
        wire.Parameter("aux.weight", [10, 32], units=10, kind="Linear"),
        wire.Parameter("head.weight", [10, 32], units=10, kind="Linear"),
        wire.Parameter("head.bias", [10], kind="Linear"),
    ]
    return listed


@dataclass
class Run:
    """A run in the making: its parameters and how it goes."""

    name: str
    project: str = "demo"
    parameters: list[wire.Parameter] = field(default_factory=residual_net)
    slope: float = 0.0
    """Decades of the ratio from the last to the first parameter."""
    planted: bool = False
    seed: int = 0
    attributes: dict[str, str] = field(default_factory=dict)

    def register(self, http: httpx.Client) -> str:
        """Make the run known and return its id."""
        registration = wire.Registration(
            project=self.project,
            name=self.name,
            parameters=self.parameters,
            attempt=1,
            started_at=time.time() - 3600,
            attributes={"host": "looking-glass", "optimizer": "SGD"} | self.attributes,
        )
        answer = http.post("/api/v1/runs", content=wire.encode_json(registration), headers=_JSON)
        assert answer.status_code in (200, 201), answer.text
        run_id: str = answer.json()["id"]
        return run_id

    def send(self, http: httpx.Client, run_id: str, steps: range, end: str | None = None) -> None:
        """Send the samples of these steps, a loss for every step among them."""
        names = [parameter.name for parameter in self.parameters]
        first, last = steps[0], steps[-1]
        every = range(first, last + 1)
        trail = {"loss": wire.Trail(steps=list(every), values=[wire.serialise(self.loss(step)) for step in every])}
        samples = [self.sample(step, names) for step in steps]
        for index in range(0, len(samples), 250):
            part = samples[index : index + 250]
            over = index + 250 >= len(samples)
            batch = wire.Batch(
                id=f"{first}-{last}-{index}",
                attempt=1,
                samples=part,
                trail=trail if index == 0 else {},
                end=wire.End(at=time.time(), status=end) if over and end else None,
            )
            answer = http.post(f"/api/v1/runs/{run_id}/samples", content=wire.encode(batch), headers=_MESSAGEPACK)
            assert answer.status_code == 200, answer.text

    def histograms(self, unit_ratio: NDArray[np.float32]) -> dict[str, list[float]]:
        """Return the units by their ratio, each parameter's evenly spread over a decade below its largest."""
        bins = wire.HISTOGRAM_EDGES.size + 1
        found = np.zeros((3, bins))
        for place, (parameter, largest) in enumerate(zip(self.parameters, unit_ratio.tolist(), strict=True)):
            if largest == wire.MISSING or not np.isfinite(largest) or parameter.name == "head.weight":
                continue
            ratios = largest * 10.0 ** -np.linspace(0, 1, parameter.units)
            places = np.searchsorted(wire.HISTOGRAM_EDGES, ratios, side="left")
            found[3 * place // len(self.parameters)] += np.bincount(places, minlength=bins)
        return dict(zip(wire.HISTOGRAMS, found.tolist(), strict=True))

    def loss(self, step: int) -> float:
        """Return the loss at a step: it falls, and turns NaN where a NaN is planted."""
        if self.planted and step >= NAN_STEP:
            return float("nan")
        return 0.25 + 2.1 * float(np.exp(-step / 180)) + 0.06 * float(np.sin(step * 12.9898 + self.seed))

    def sample(self, step: int, names: list[str]) -> wire.Sample:
        """Return everything measured at a step."""
        random = np.random.default_rng([self.seed, step])
        depth = np.linspace(1.0, 0.0, len(names))
        walk = 0.35 * np.sin(step / 70 + 4 * depth) + 0.12 * random.standard_normal(len(names))
        kind = np.array([-0.9 if name.endswith("bias") or ".norm." in name else 0.0 for name in names])
        ratio = 10.0 ** (-2.4 - 0.5 * (1 - np.exp(-step / 200)) + self.slope * depth + walk + kind)
        weights = (4.0 + 3.0 * depth + step / 900).astype(np.float32)
        gradients = (ratio * weights).astype(np.float32)
        zero_units = np.clip(0.04 + 0.03 * random.standard_normal(len(names)), 0, 1).astype(np.float32)
        if self.planted:
            _plant(step, names, gradients)
        measured = gradients != wire.MISSING
        total = float(np.sqrt(np.sum(np.where(measured, gradients, 0.0).astype(np.float64) ** 2)))
        unit_ratio = np.where(measured, gradients / weights * 3.1, wire.MISSING).astype(np.float32)
        limit = LIMITS[int(np.searchsorted(LIMIT_STEPS, step, side="right")) - 1]
        return wire.Sample(
            histograms=self.histograms(unit_ratio),
            step=step,
            at=time.time(),
            statistics={
                "grad_norm": gradients,
                "clipped_grad_norm": _clipped(gradients, total, limit),
                "weight_norm": weights,
                "max_unit_ratio": unit_ratio,
                "zero_unit_share": zero_units,
                "nonfinite_count": (~np.isfinite(gradients)).astype(np.float32),
            },
            scalars=({"global_grad_norm_limit": limit} if np.isfinite(limit) else {})
            | {
                "global_grad_norm": wire.serialise(total),
                "clipped_global_grad_norm": wire.serialise(min(total, limit) if np.isfinite(total) else total),
                "learning_rate": 0.1 * 0.5 * (1 + float(np.cos(np.pi * min(step, 1200) / 1200))),
                "overhead_ratio": 0.004 + 0.001 * float(random.random()),
            },
        )


def _clipped(gradients: NDArray[np.float32], total: float, limit: float) -> NDArray[np.float32]:
    factor = min(1.0, limit / total) if np.isfinite(total) and total else 1.0
    return np.where(gradients == wire.MISSING, wire.MISSING, gradients * factor).astype(np.float32)


def _plant(step: int, names: list[str], gradients: NDArray[np.float32]) -> None:
    if step == SPIKE_STEP:
        gradients[names.index(SPIKE_PARAMETER)] *= 3e4
    if step == INFINITE_STEP:
        gradients[names.index(INFINITE_PARAMETER)] = np.inf
    if step in ZERO_STEPS:
        gradients[names.index(ZERO_PARAMETER)] = 0.0
    if step >= NAN_STEP:
        gradients[names.index(NAN_PARAMETER)] = np.nan
    if step >= NAN_STEP + 40:
        gradients[len(names) // 2 :] = np.nan
    if step % 4:
        gradients[names.index(MISSING_PARAMETER)] = wire.MISSING


def dropped_batch(samples: int) -> wire.Batch:
    """Return a batch that says only how many samples its agent had to give up."""
    return wire.Batch(id=f"dropped-{samples}", attempt=1, dropped=wire.Dropped(samples=samples))


_JSON = {"content-type": wire.JSON_TYPE}
_MESSAGEPACK = {"content-type": wire.MESSAGEPACK_TYPE}


def fill(url: str, steps: int = 600) -> dict[str, str]:
    """Send four runs and return their ids by name."""
    runs = [
        Run("resnet-digits", seed=1),
        Run("sigmoid-20-layers", slope=-5.5, seed=2),
        Run("resnet-nan", planted=True, seed=3),
        Run("<img src=x onerror=alert(1)>", project="<b>other</b>", seed=4),
    ]
    ids = {}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for run in runs:
            ids[run.name] = run.register(http)
            run.send(http, ids[run.name], range(steps), end="failed" if run.planted else None)
    return ids


if __name__ == "__main__":
    print(fill(sys.argv[1]))
