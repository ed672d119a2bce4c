"""The map's colours are told apart by every kind of colour vision."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page

from tests.page.conftest import Filled

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1.0, in linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
LEAST_DISTANCE = 25.0
"""CIE76; 2.3 is just noticeable."""


def lab(colour: list[int], vision: str) -> NDArray[np.float64]:
    """Return the CIELAB of an sRGB colour as somebody with this vision sees it."""
    share = np.array(colour) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = _TO_XYZ @ np.clip(VISIONS[vision] @ linear, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("vision", VISIONS)
def test_nan_infinity_and_zero_stand_apart_from_every_value_and_each_other(
    page: Page, filled: Filled, vision: str
) -> None:
    page.goto(f"{filled.url}/server")
    drawn = page.evaluate(
        """async () => {
          const { STATES, viridis } = await import("/page/js/charts/colours.js");
          const hex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
          const ramp = Array.from({ length: 60 }, (_, at) => viridis(at / 59));
          return { ramp, states: Object.values(STATES).map(hex) };
        }"""
    )
    ramp = [lab(colour, vision) for colour in drawn["ramp"]]
    states = [lab(colour, vision) for colour in drawn["states"]]

    assert min(float(np.linalg.norm(state - value)) for state in states for value in ramp) > LEAST_DISTANCE
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(states, 2)) > LEAST_DISTANCE
    lightness = [value[0] for value in ramp]
    assert lightness == sorted(lightness), "brighter is more, in print as well"
