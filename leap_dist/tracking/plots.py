"""Pictures of what was traded: colours that colour-blind readers can tell apart, and a marker for each line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"

Line = Sequence[tuple[float, float, float]]
"""(density, mean, spread) of each point."""


def plot_trade_off(
    panels: Mapping[str, Mapping[str, Line]],
    dense: Mapping[str, float],
    metric: str,
    path: Path,
    fronts: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """A metric over density: a panel for each group of runs, a line for each rule, bars for the spread over seeds.

    Where a line has several points at one density only the points are drawn.

    dense: the dense model's value by panel, drawn as a dashed line. fronts: (density, value) of the points to ring, by
    panel: those of the Pareto front. The suffix of `path` decides the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.0 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        if title in dense:
            axis.axhline(dense[title], color="0.5", linestyle="--", linewidth=1, label="dense")
        for number, (name, line) in enumerate(lines.items()):
            density, mean, spread = zip(*sorted(line), strict=True)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            if len({round(point, 3) for point in density}) < len(density):
                style["linestyle"] = "none"  # several runs at one density: a line through them would be a zigzag
            axis.errorbar(density, mean, yerr=spread, capsize=3, linewidth=1.5, markersize=5, label=name, **style)
        if front := sorted((fronts or {}).get(title, ())):
            ring = {"marker": "o", "s": 130, "facecolors": "none", "edgecolors": "0.3", "label": "Pareto front"}
            axis.scatter(*zip(*front, strict=True), **ring)
        ticks = _apart(sorted({round(point[0], 3) for line in lines.values() for point in line}))
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("density")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of ascending ticks that have room for their label on a logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.1 * kept[-1]:
            kept.append(tick)
    return kept
