"""How pictures look and are written: light and dark, in colours that colour-blind readers can tell apart.

A picture is drawn once, light. In the dark SVG its page colours are others, and inside a page they are the page's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from leap_dist.errors import UserError, printable
from leap_dist.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito, and grey
MARKERS = "osD^vPX"
DPI = 150
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
DRAWN = frozenset(("svg", "g", "defs", "clipPath", "path", "rect", "circle", "use", "text", "tspan", "image"))
NOT_IN_A_PAGE = ("width", "height", "version", "type")  # attributes of the outermost element
LOCAL = re.compile(r"#[\w.\-]+|data:image/png;base64,[\w+/=\s]+")  # what a picture in a page may refer to


INK, FAINT, PAPER = "#1c1e21", "#c9cdd2", "#fefefe"  # of text, of what is faint, and of the page; used for nothing else
DARK = {INK: "#e8eaed", FAINT: "#4a4f55", PAPER: "#16181b"}
OF_THE_PAGE = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}


@dataclass(frozen=True)
class Picture:
    """size: width and height in inches; draw: fills a figure of that size."""

    size: tuple[float, float]
    draw: Callable[[Figure], None]


Line = Sequence[tuple[float, float, float]]
"""(density, mean, spread) of each point."""


# ---------------------------------------------------------------------------------------------- files


def save(picture: Picture, *paths: Path) -> None:
    """Draw once and write it to files whose suffixes decide the formats."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_style()):
        layout = ConstrainedLayoutEngine()
        figure = Figure(figsize=picture.size, layout=layout)
        picture.draw(figure)
        layout.execute(figure)
        figure.set_layout_engine(None)  # done: it costs as much as drawing, and is the same for every file
        for path in paths:
            kind = path.suffix.removeprefix(".")
            with replacing(path) as partial:
                figure.savefig(partial, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {})


def save_all(picture: Picture, stem: Path) -> list[Path]:
    """stem.png, stem.svg, and stem_dark.svg for dark pages."""
    png, svg, dark = files_of(stem)
    save(picture, png, svg)
    write_text(dark, _recoloured(svg.read_text(encoding="utf-8"), DARK))
    return [png, svg, dark]


def files_of(stem: Path) -> list[Path]:
    """The files that `save_all` writes."""
    return [stem.with_name(f"{stem.name}{end}") for end in (".png", ".svg", "_dark.svg")]


def _recoloured(text: str, colours: Mapping[str, str]) -> str:
    for old, new in colours.items():
        text = text.replace(old, new)
    return text


def _style() -> dict[Any, Any]:
    """matplotlib's settings; text stays text in an SVG, and the same picture gives the same bytes."""
    text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
    return {
        **dict.fromkeys(text, INK),
        "axes.edgecolor": INK,
        "axes.facecolor": PAPER,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.facecolor": PAPER,
        "font.size": 10,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "leap_dist",
        "text.parse_math": False,  # names may hold "$"
    }


# ---------------------------------------------------------------------------------------------- inside a page


def inline(file: Path, prefix: str, label: str) -> str:
    """An SVG that `save` wrote, to stand in a page: in the page's colours, with ids that begin with `prefix`.

    Only drawing is taken over: no script, no style sheet, no reference to anything outside. `label`: for screen
    readers. Raises UserError if the file is none.
    """
    try:
        root = ElementTree.parse(file).getroot()
        width = float(root.attrib["width"].removesuffix("pt"))
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise UserError(
            f"{file}: damaged: not an SVG file of ours: {error}; remove it, or write the run's report again"
        ) from error
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag not in {f"{{{SVG}}}{name}" for name in DRAWN}:
                parent.remove(child)
    used = {name for item in root.iter() for text in item.attrib.values() for name in re.findall(r"#([\w.\-]+)", text)}
    for item in root.iter():
        kept = ((key, _in_page(key, value, used, prefix)) for key, value in item.attrib.items())
        item.attrib = {key: value for key, value in kept if value is not None}
    for name in NOT_IN_A_PAGE:
        root.attrib.pop(name, None)
    limits = f"min-width: {0.9 * width:.0f}px; max-width: {1.5 * width:.0f}px"  # letters of 9 to 15 px
    root.attrib |= {"role": "img", "aria-label": printable(label), "style": limits}
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _in_page(key: str, value: str, used: set[str], prefix: str) -> str | None:
    """An attribute in a page; None for a handler, a reference to elsewhere, and an id that nothing refers to."""
    name = key.rpartition("}")[2]
    if name == "id":
        return f"{prefix}{value}" if value in used else None
    if name == "href":
        return value.replace("#", f"#{prefix}", 1) if LOCAL.fullmatch(value) else None
    if name.startswith("on") or not all(part.startswith("#") for part in re.findall(r"(?i)url\(([^)]*)", value)):
        return None
    return _recoloured(value.replace("url(#", f"url(#{prefix}"), OF_THE_PAGE)


# ---------------------------------------------------------------------------------------------- what was traded


def trade_off(
    panels: Mapping[str, Mapping[str, Line]],
    dense: Mapping[str, float],
    metric: str,
    fronts: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Picture:
    """A metric over density: a panel for each group of runs, a line for each rule, bars for the spread over seeds.

    Where a line has several points at one density only the points are drawn.

    dense: the dense model's value by panel, drawn as a dashed line. fronts: (density, value) of the points to ring, by
    panel: those of the Pareto front.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            if title in dense:
                axis.axhline(dense[title], color=INK, linestyle="--", linewidth=1, label="dense model")
            for number, (name, line) in enumerate(lines.items()):
                _draw_line(axis, number, name, line)
            if front := sorted((fronts or {}).get(title, ())):
                ring = {"marker": "o", "s": 130, "facecolors": "none", "edgecolors": INK, "label": "Pareto front"}
                axis.scatter(*zip(*front, strict=True), **ring)
            _label_densities(axis, [point[0] for line in lines.values() for point in line])
            axis.set_title(printable(title))
        axes[0].set_ylabel(printable(metric))
        legend_below(figure, axes)

    width = max(1.2 + 4.0 * len(panels), 6.4)
    labels = {"dense model", "Pareto front"} | {name for lines in panels.values() for name in lines}
    return Picture((width, 3.8 + 0.22 * math.ceil(len(labels) / _columns(labels, width))), draw)


def _draw_line(axis: Any, number: int, name: str, line: Line) -> None:
    density, mean, spread = zip(*sorted(line), strict=True)
    style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    if len({round(point, 3) for point in density}) < len(density):
        style["linestyle"] = "none"  # several runs at one density: a line through them would be a zigzag
    bars = spread if any(spread) else None
    axis.errorbar(density, mean, yerr=bars, capsize=3, linewidth=1.5, markersize=5, label=_label(name), **style)


def _label(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out what begins with "_"."""
    return printable(f" {name}" if name.startswith("_") else name)


def _label_densities(axis: Any, densities: Sequence[float]) -> None:
    """A logarithmic axis with a tick at every density that has room for its label."""
    ticks: list[float] = []
    for tick in sorted({round(density, 3) for density in densities}):
        if not ticks or tick > 1.15 * ticks[-1]:
            ticks.append(tick)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("density: share of the prunable weights that is kept")
    axis.grid(True)


def legend_below(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, where it covers nothing, in as many columns as there is room for."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = min(len(found), _columns(found, figure.get_figwidth()))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _columns(labels: Collection[str], width: float) -> int:
    """Columns of a legend, each with a sample and the longest label, that a width in inches has room for."""
    return max(1, int(width / (0.7 + 0.085 * max(map(len, labels)))))
