"""Density against a metric: which way is better, which models no other beats, and the picture of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leap_dist.tracking.plots import COLOURS, Picture, trade_off

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Point:
    """A pruned model in the picture: models of one group share a panel, those of one line a line.

    spread: the standard deviation of `value` over seeds, if it is a mean.
    """

    group: str
    line: str
    density: float
    value: float
    dense: float | None
    spread: float = 0.0


def higher_is_better(metric: str) -> bool:
    """False for a loss, a perplexity and bits per byte, of any split."""
    return not metric.endswith(LOWER_IS_BETTER)


def pareto(points: Sequence[tuple[Any, float, float] | None]) -> list[bool]:
    """Which points no other of their group beats: none is at most as dense and at least as good, and better in one.

    points: (group, density, what is to be large); None for what takes no part.
    """
    given = [point for point in points if point is not None]

    def beaten(point: tuple[Any, float, float]) -> bool:
        group, density, value = point
        rivals = [other for other in given if other[0] == group and other[1] <= density and other[2] >= value]
        return any(other[1] < density or other[2] > value for other in rivals)

    return [point is not None and not beaten(point) for point in points]


def group_names(groups: Sequence[tuple[str, str]], unnamed: str) -> dict[tuple[str, str], str]:
    """What to call each group, (task, data): by its task, with the data where models of the task are judged on several.

    unnamed: what data without a name are called. In their order.
    """
    tasks = Counter(task for task, _ in set(groups))
    return {(task, data): task if tasks[task] == 1 else f"{task}: {data or unnamed}" for task, data in groups}


def picture_of(points: Sequence[Point], metric: str) -> Picture:
    """A panel a group, with its front ringed; of more lines than there are colours the front alone."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    fronts: dict[str, list[tuple[float, float]]] = {}
    for point, best in zip(points, pareto([(p.group, p.density, sign * p.value) for p in points]), strict=True):
        if best:
            fronts.setdefault(point.group, []).append((point.density, point.value))
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    dense: dict[str, float] = {}
    for point in points:
        panels.setdefault(point.group, {}).setdefault(point.line, []).append((point.density, point.value, point.spread))
        if point.dense is not None:
            dense.setdefault(point.group, point.dense)
    for group, lines in panels.items():
        if len(lines) > len(COLOURS):
            panels[group] = {"best of all": [(density, value, 0.0) for density, value in fronts[group]]}
    return trade_off(panels, dense, metric, fronts)
