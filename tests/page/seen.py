"""Reads colours from what is drawn on a page: pixels, not the page's own account of itself."""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Page

Pixels = NDArray[np.uint8]


@dataclass
class Plot:
    """Where the cells of the map lie on the screen, in CSS pixels."""

    left: float
    top: float
    width: float
    height: float

    def x(self, step: float, first: float, past: float) -> float:
        """Return the x of a step where steps ``first`` to ``past`` (exclusive) are seen."""
        return self.left + (step - first) / (past - first) * self.width

    def y(self, row: float, rows: int) -> float:
        """Return the y of a row's middle."""
        return self.top + (row + 0.5) / rows * self.height


def plot(page: Page) -> Plot:
    """Return where the map's cells are, by the layout that the page's style fixes: gutter, alert lane and step axis."""
    box = page.locator(".map .over").bounding_box()
    assert box is not None
    left = 150 if box["width"] >= 640 else 74
    return Plot(box["x"] + left, box["y"] + 18, box["width"] - left - 10, box["height"] - 18 - 24)


def pixels(page: Page, area: Plot) -> Pixels:
    """Return what is seen in an area, shape (height, width, 3)."""
    clip = {"x": area.left, "y": area.top, "width": area.width, "height": area.height}
    return decode(page.screenshot(clip=clip))  # type: ignore[arg-type]


def near(picture: Pixels, colour: str, most: int = 12) -> NDArray[np.bool_]:
    """Return where a picture has a colour (``#rrggbb``), give or take."""
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    close: NDArray[np.bool_] = (np.abs(picture.astype(np.int16) - wanted) <= most).all(axis=2)
    return close


def decode(png: bytes) -> Pixels:
    """Decode an 8-bit RGB or RGBA PNG without interlacing, which is what Chromium makes."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, data = 8, b""
    width = height = channels = 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour_type, *_ = struct.unpack(">IIBBBBB", body)
            assert depth == 8
            channels = {2: 3, 6: 4}[colour_type]
        elif kind == b"IDAT":
            data += body
        at += 12 + length
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    return _unfiltered(lines, channels).reshape(height, width, channels)[:, :, :3]


def _unfiltered(lines: Pixels, channels: int) -> Pixels:
    rows = np.zeros((len(lines), lines.shape[1] - 1), np.uint8)
    above = np.zeros(rows.shape[1], np.uint8)
    for index, line in enumerate(lines):
        kind, raw = int(line[0]), line[1:]
        if kind == 0:
            rows[index] = raw
        elif kind == 2:
            rows[index] = raw + above
        elif kind == 1:
            rows[index] = np.cumsum(raw.reshape(-1, channels), axis=0, dtype=np.uint8).reshape(-1)
        else:
            rows[index] = _sequential(kind, raw, above, channels)
        above = rows[index]
    return rows


def _sequential(kind: int, raw: Pixels, above: Pixels, channels: int) -> Pixels:
    """Undo the filters Average (3) and Paeth (4)."""
    line, upper = [0] * channels + raw.tolist(), [0] * channels + above.tolist()
    for at in range(channels, len(line)):
        left, up, corner = line[at - channels], upper[at], upper[at - channels]
        if kind == 3:
            guess = (left + up) // 2
        else:
            estimate = left + up - corner
            guess = min((left, up, corner), key=lambda value: abs(estimate - value))
        line[at] = (line[at] + guess) & 255
    return np.array(line[channels:], np.uint8)
