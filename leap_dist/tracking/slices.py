"""The picture of a search: the metric over each setting that was searched, the density as colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leap_dist.errors import printable
from leap_dist.tracking.plots import INK, Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 3  # panels in a row
WIDE = 30.0  # where the largest value is so many times the smallest, the axis is logarithmic


@dataclass(frozen=True)
class Slice:
    """A setting: its value in each trial, a number or a text, and how much of the metric it explains, if known."""

    key: str
    values: Sequence[float | str]
    importance: float | None = None


def slices(found: Sequence[Slice], metric: str, values: Sequence[float], densities: Sequence[float]) -> Picture:
    """A panel a setting, those that matter most first; values, densities: of each trial."""
    ordered = sorted(found, key=lambda item: -(item.importance or 0.0))
    across = min(ACROSS, len(ordered))
    down = math.ceil(len(ordered) / across)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(down, across, sharey=True, squeeze=False)
        for axis in axes.flat[len(ordered) :]:
            axis.set_visible(False)
        low, high = min(densities), max(densities)
        for axis, item in zip(axes.flat, ordered, strict=False):
            points = _draw_slice(axis, item, values, densities, (low, high))
        for row in axes:
            row[0].set_ylabel(printable(metric))
        if low < high:
            figure.colorbar(points, ax=list(axes.flat), label="density")

    return Picture((max(1.5 + 2.9 * across, 6.4), 3.0 * down + 0.3), draw)


def _draw_slice(
    axis: Any, item: Slice, values: Sequence[float], densities: Sequence[float], span: tuple[float, float]
) -> Any:
    numbers = [value for value in item.values if isinstance(value, int | float)]
    places: Sequence[float] = numbers
    if len(numbers) < len(item.values):  # texts: each has a place of its own
        texts = list(dict.fromkeys(map(str, item.values)))
        places = [texts.index(str(value)) for value in item.values]
        axis.set_xticks(range(len(texts)), [printable(text) for text in texts])
        axis.set_xlim(-0.5, len(texts) - 0.5)
    elif min(numbers) > 0 and max(numbers) > WIDE * min(numbers):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own are formulas to be parsed
        axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.set_title(printable(item.key + (f" ({item.importance:.0%})" if item.importance is not None else "")))
    axis.grid(True)
    axis.set_axisbelow(True)
    style: Mapping[str, Any] = {"cmap": "viridis", "edgecolors": INK, "linewidths": 0.4, "s": 36}
    return axis.scatter(places, values, c=densities, vmin=span[0], vmax=span[1], **style)
