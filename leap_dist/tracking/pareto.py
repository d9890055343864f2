"""Density against a metric: which way is better, which models no other beats, and the picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leap_dist.tracking.plots import COLOURS, plot_trade_off

LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Point:
    """A pruned model in the picture: models of one group share a panel, those of one line a line."""

    group: str
    line: str
    density: float
    value: float
    dense: float | None
    front: bool


def higher_is_better(metric: str) -> bool:
    """False for a loss and a perplexity, of any split."""
    return not metric.endswith(LOWER_IS_BETTER)


def pareto(points: Sequence[tuple[str, float, float] | None]) -> list[bool]:
    """Which points no other of their group beats: none is at most as dense and at least as good, and better in one.

    points: (group, density, what is to be large); None for what takes no part.
    """
    given = [point for point in points if point is not None]

    def beaten(point: tuple[str, float, float]) -> bool:
        group, density, value = point
        rivals = [other for other in given if other[0] == group and other[1] <= density and other[2] >= value]
        return any(other[1] < density or other[2] > value for other in rivals)

    return [point is not None and not beaten(point) for point in points]


def draw(points: Sequence[Point], metric: str, path: Path) -> None:
    """The picture: a panel a group, with its front ringed; of more lines than there are colours the front alone."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    dense: dict[str, float] = {}
    fronts: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        panels.setdefault(point.group, {}).setdefault(point.line, []).append((point.density, point.value, 0.0))
        if point.dense is not None:
            dense.setdefault(point.group, point.dense)
        if point.front:
            fronts.setdefault(point.group, []).append((point.density, point.value))
    for group, lines in panels.items():
        if len(lines) > len(COLOURS):
            panels[group] = {"best of all": [(density, value, 0.0) for density, value in fronts[group]]}
    plot_trade_off(panels, dense, metric, path, fronts)
