"""Pictures of one run, from the files in its folder: its course, what each matrix kept, where the scores were cut."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from leap_dist.errors import printable
from leap_dist.tracking.plots import COLOURS, FAINT, INK, PAPER, Picture, legend_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = COLOURS[:3]
MOST_POINTS = 1000  # of a curve; more cannot be seen
MOST_NUMBERED = 24  # layers, and matrices in them, whose cells have room for their numbers
MOST_LABELS = 40  # along one side of a picture
PARTS = {"head": "heads", "expert": "experts"}  # gates whose units are drawn one by one


# ---------------------------------------------------------------------------------------------- the course


def course(steps: Sequence[Mapping[str, Any]], target: float) -> Picture:
    """Density, R and the scheduled level over the steps, and the loss below; steps: the lines of metrics.jsonl."""
    shown = list(steps[:: 1 + len(steps) // MOST_POINTS])
    shown += [] if shown[-1] is steps[-1] else [steps[-1]]
    at = [line["step"] for line in shown]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        top.set_title(f"From dense to a density of {target:g}", pad=20)
        top.plot(at, [line["level"] for line in shown], color=FAINT, linewidth=6, label="scheduled level")
        top.plot(at, [line["remaining"] for line in shown], color=BLUE, linewidth=1.8, label="R, what thresholds ask")
        dashes = {"linestyle": (0, (4, 3)), "linewidth": 1.8}
        top.plot(at, [line["density"] for line in shown], color=ORANGE, label="density, what masks keep", **dashes)
        top.axhline(target, color=INK, linewidth=0.8, linestyle=":", label=f"target {target:g}")
        top.set_ylabel("share of the\nprunable weights")
        top.set_ylim(0, 1.04)
        bottom.plot(at, [line["loss"] for line in shown], color=GREEN, linewidth=1.2)
        bottom.set_ylabel("training loss")
        bottom.set_xlabel("optimizer step")
        bottom.set_xlim(0, at[-1])
        _shade_phases((top, bottom), steps)
        legend_below(figure, [top])

    return Picture((7.2, 5.0), draw)


def _shade_phases(axes: Sequence[Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Every second phase on a tinted ground, the names above."""
    begin = 0
    for number, (phase, lines) in enumerate(groupby(steps, key=lambda line: line["phase"])):
        end = list(lines)[-1]["step"]
        for axis in axes:
            axis.axvspan(begin, end, color=FAINT if number % 2 else PAPER, alpha=0.35, linewidth=0, zorder=0)
        place = {"xycoords": axes[0].get_xaxis_transform(), "xytext": (0, 4), "textcoords": "offset points"}
        axes[0].annotate(
            printable(phase), ((begin + end) / 2, 1.0), ha="center", va="bottom", fontsize="small", **place
        )
        begin = end


# ---------------------------------------------------------------------------------------------- what is kept


def kept(tensors: Mapping[str, Mapping[str, Any]], gates: Sequence[Mapping[str, Any]]) -> Picture:
    """The keep ratio of every matrix, layers down and matrices across; heads and experts one by one beside it.

    tensors: those of a certificate; gates: those of scores.json.
    """
    layers, matrices, grid = _grid({name: t["density"] for name, t in tensors.items() if t["counted"]})
    units = {
        kind: found for kind in PARTS if (found := [g for g in gates if g["granularity"] == kind and "which" in g])
    }
    sizes = [(len(matrices), 0.72), *((max(g["units"] for g in found), 0.3) for found in units.values())]
    widths = [inches * min(max(num, 4), MOST_LABELS) for num, inches in sizes]

    def draw(figure: Figure) -> None:
        first, *others = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _draw_ratios(figure, first, grid)
        at, labels = _labels(matrices)
        first.set_xticks(at, labels, rotation=40, ha="right", rotation_mode="anchor")
        first.set_yticks(*_labels(layers))
        first.set_ylabel("layer")
        for axis, (kind, found) in zip(others, units.items(), strict=True):
            _draw_units(axis, kind, found)

    height = 2.0 + 0.3 * min(max(len(layers), 3), MOST_LABELS)
    return Picture((2.6 + sum(widths) + 0.8 * len(units), height), draw)


def _grid(ratios: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """(layers, matrices, ratios by layer and matrix); NaN where a layer has no such matrix."""
    places = {name: _place(name) for name in ratios}
    layers = sorted({layer for layer, _ in places.values()}, key=_natural)
    matrices = list(dict.fromkeys(matrix for _, matrix in places.values()))
    grid = [[math.nan] * len(matrices) for _ in layers]
    for name, (layer, matrix) in places.items():
        grid[layers.index(layer)][matrices.index(matrix)] = ratios[name]
    return layers, matrices, grid


def _labels(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places along a side and short names there, every second, third, ... of very many."""
    every = math.ceil(len(names) / MOST_LABELS)
    return list(range(0, len(names), every)), [printable(name) for name in _short(names)[::every]]


def _draw_ratios(figure: Figure, axis: Any, grid: Sequence[Sequence[float]]) -> None:
    edges = [[number - 0.5 for number in range(count + 1)] for count in (len(grid[0]), len(grid))]
    mesh = axis.pcolormesh(*edges, grid, cmap="cividis", vmin=0, vmax=1, edgecolors=PAPER, linewidth=1)
    if max(len(grid), len(grid[0])) <= MOST_NUMBERED:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    ink = "#000000" if value > 0.55 else "#ffffff"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize="x-small")
    axis.set_title("Kept of every matrix")
    figure.colorbar(mesh, ax=axis, label="keep ratio", fraction=0.05, aspect=12)
    _frame(axis)


def _draw_units(axis: Any, kind: str, gates: Sequence[Mapping[str, Any]]) -> None:
    """A cell for each head or expert, filled if it is kept."""
    from matplotlib.colors import ListedColormap

    layers = [_place(gate["name"].rpartition(":")[0])[0] for gate in gates]
    width = max(gate["units"] for gate in gates)
    cells = [[_cell(gate, unit) for unit in range(width)] for gate in gates]
    edges = [number - 0.5 for number in range(width + 1)], [number - 0.5 for number in range(len(gates) + 1)]
    colours = ListedColormap([FAINT, BLUE])
    axis.pcolormesh(*edges, cells, cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1)
    axis.set_title(f"{PARTS[kind].capitalize()} kept (blue)")
    axis.set_xlabel(kind)
    axis.set_xticks(range(0, width, max(1, width // 8)))
    axis.set_yticks(*_labels(layers))
    _frame(axis)


def _cell(gate: Mapping[str, Any], unit: int) -> float:
    return float(unit in gate["which"]) if unit < gate["units"] else math.nan


def _frame(axis: Any) -> None:
    """Layers from the top down, without the lines of a plot."""
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _place(tensor: str) -> tuple[str, str]:
    """(path to the layer with its number, matrix inside it): "encoder.layer.3", "output.dense"."""
    found = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.+?))??(?:\.weight)?", tensor)
    return (found[1], found[2] or "weight") if found else ("none", tensor.removesuffix(".weight"))


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _short(names: Sequence[str]) -> list[str]:
    """Of every name the last parts that no other name ends in."""

    def shortest(name: str) -> str:
        parts = name.split(".")
        for start in reversed(range(len(parts))):
            end = ".".join(parts[start:])
            if sum(f".{other}".endswith(f".{end}") for other in set(names)) == 1:
                return end
        return name

    return [shortest(name) for name in names]


# ---------------------------------------------------------------------------------------------- scores


def scores(gates: Sequence[Mapping[str, Any]], reach: float) -> Picture:
    """How far the scores are from their gate's cut: a panel for each granularity, its gates taken together.

    gates, reach: those of scores.json.
    """
    kinds = list(dict.fromkeys(gate["granularity"] for gate in gates))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            found = [gate for gate in gates if gate["granularity"] == kind]
            _draw_scores(axis, found, reach)
            axis.set_title(
                f"{printable(kind)}: {sum(g['kept_units'] for g in found):,} of {sum(g['units'] for g in found):,} kept"
            )
            axis.set_xlabel("score minus the cut of its gate,\nin standard deviations of the gate's scores")
        axes[0].set_ylabel("units")
        legend_below(figure, axes)

    return Picture((1.6 + 3.6 * len(kinds), 3.9), draw)


def _draw_scores(axis: Any, gates: Sequence[Mapping[str, Any]], reach: float) -> None:
    num = len(gates[0]["kept"])
    edges = [reach * (2 * place / num - 1) for place in range(num + 1)]
    below = [0] * num
    for key, colour in (("removed", ORANGE), ("kept", BLUE)):
        counts = [sum(gate[key][place] for gate in gates) for place in range(num)]
        above = [low + count for low, count in zip(below, counts, strict=True)]
        axis.stairs(above, edges, baseline=below, fill=True, color=colour, label=key)
        below = above
    axis.axvline(0, color=INK, linewidth=1, linestyle="--", label="cut")
    axis.set_xlim(-reach, reach)
    axis.grid(True, axis="y")
    axis.set_axisbelow(True)
    axis.margins(y=0.08)
    axis.yaxis.get_major_locator().set_params(integer=True)
