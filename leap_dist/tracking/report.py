"""Pages to look at: that of a run, and that of several runs. One file each, which opens without a network.

Everything that comes from outside (names, settings, messages) is escaped; a page runs its own script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from leap_dist.core.measure import amounts, said_of
from leap_dist.errors import printable
from leap_dist.files import write_text
from leap_dist.run_folder import PLOTS, REPORT, RunFiles, exports, read_files
from leap_dist.secrets import hide_in, hide_secrets
from leap_dist.tracking import run_plots
from leap_dist.tracking.plots import Picture, files_of, inline, save, save_all

TEMPLATES = Path(__file__).with_name("page")
LABELS = {
    "course": "density, R and loss over the steps of the run, in its three phases",
    "kept": "keep ratio of every matrix by layer",
    "scores": "histogram of the scores around the cut",
}
MOST_DETAILED = 100  # runs whose pictures a page holds; those on the front come first
MOST_CHOICES = 12  # values of a setting that one chooses from


@dataclass(frozen=True)
class Entry:
    """A run on a page of several. What is not known is None; settings: what to tell runs apart by, as text.

    front: on the Pareto front. folder: where its files are, or were. parameters: all settings, to look up.
    """

    name: str
    status: str
    settings: Mapping[str, str]
    target: float | None = None
    density: float | None = None
    value: float | None = None
    dense: float | None = None
    kept: int | None = None
    leap_ms: float | None = None
    seconds: float | None = None
    front: bool = False
    folder: Path | None = None
    error: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its cells, and its title if that is another."""

    key: str
    numeric: bool = True
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.key)


GATE_COLUMNS = (
    Column("name", False),
    Column("granularity", False),
    Column("units"),
    Column("kept_units", title="units kept"),
    Column("prunable", title="weights"),
    Column("kept", title="weights kept"),
    Column("density"),
)
TENSOR_COLUMNS = (
    Column("tensor", False),
    Column("shape", False),
    Column("numel", title="weights"),
    Column("kept", title="weights kept"),
    Column("density"),
    Column("zeros_kept", title="kept, yet zero"),
)
EXPORT_COLUMNS = (Column("kind", False), Column("parameters"), Column("bytes"), Column("latency", title="latency, ms"))


# ---------------------------------------------------------------------------------------------- one run


def write_report(folder: Path) -> list[Path]:
    """Draw the pictures of a finished run and write its page, all into its folder; returns what to keep of it.

    Raises UserError if the folder holds no finished run.
    """
    files = read_files(folder)
    (folder / PLOTS).mkdir(exist_ok=True)
    for name, picture in pictures_of(files).items():
        save_all(picture, folder / PLOTS / name)
    write_text(folder / REPORT, run_page(files))
    return [folder / PLOTS, folder / REPORT]


def has_report(folder: Path) -> bool:
    """Whether a finished run has its page and all its pictures."""
    wanted = [path for name in pictures_of(read_files(folder)) for path in files_of(folder / PLOTS / name)]
    return all(path.is_file() for path in (folder / REPORT, *wanted))


def pictures_of(files: RunFiles) -> dict[str, Picture]:
    """The pictures that the files suffice for, by name."""
    pictures = {}
    if files.steps:
        pictures["course"] = run_plots.course(files.steps, _among_densities(files.certificate))
    if any(tensor["counted"] for tensor in files.certificate["tensors"].values()):
        pictures["kept"] = run_plots.kept(files.certificate["tensors"], files.scores.get("gates", []))
    if files.scores.get("gates"):
        pictures["scores"] = run_plots.scores(**files.scores)
    return pictures


def _among_densities(certificate: Mapping[str, Any]) -> float:
    """The target among densities; of one in another measure the density that it came to."""
    return float(certificate["density" if certificate.get("measure") else "target"])


def run_page(files: RunFiles) -> str:
    """The page of a run as HTML; its pictures have to be there."""
    found, folder = files.certificate, files.folder
    metrics = found["metrics"]
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    tensors = found["tensors"].items()
    return _render(
        "run.html",
        title=f"{folder.resolve().name}: {said_of(found)} {found['target']:g}",
        verdict=_verdict(files),
        facts=_facts(files),
        metric_columns=[Column("model", numeric=False), *map(Column, names)],
        metric_rows=[
            {"model": model, **{name: values.get(name) for name in names}} for model, values in metrics.items()
        ],
        pictures=_inlined(folder, "p"),
        notes=_missing(files),
        export_columns=EXPORT_COLUMNS,
        export_rows=[asdict(export) for export in exports(folder)],
        gate_columns=GATE_COLUMNS,
        gate_rows=[{"name": "", "units": None, "kept_units": None} | gate for gate in found["gates"]],
        tensor_columns=TENSOR_COLUMNS,
        tensor_rows=[t | {"tensor": name, "shape": "×".join(map(str, t["shape"]))} for name, t in tensors],
        job=hide_secrets(json.dumps(hide_in(files.job), indent=2, ensure_ascii=False)),
        versions=found["versions"] | {key: found[key] for key in ("masks_sha256", "weights_sha256")},
    )


def _verdict(files: RunFiles) -> str:
    """What came out, in one sentence."""
    found, name = files.certificate, files.metric
    text = f"Kept {found['kept']:,} of {found['prunable']:,} prunable weights: density {found['density']:.4f}, "
    kept, total = amounts(found, found.get("measure"))
    measured = f"{said_of(found)} {kept / total:.4f}, " if found.get("measure") else ""
    text += f"{measured}asked for {found['target']:g}."
    dense, pruned = (found["metrics"].get(model, {}).get(name) for model in ("dense", "pruned"))
    if dense is not None and pruned is not None:
        text += f" {name}: {dense:.4g} dense → {pruned:.4g} pruned ({pruned - dense:+.2g})."
    return text


def _facts(files: RunFiles) -> dict[str, Any]:
    """What the run was, as far as it is known."""
    job, found = files.job, files.certificate
    leap = job.get("leap", {})
    facts = {
        "task": job.get("data", {}).get("task"),
        "model": job.get("model", {}).get("name"),
        "gates": " + ".join(dict.fromkeys(gate["granularity"] for gate in found["gates"])),
        "rule": leap.get("rule"),
        "steps": files.steps[-1]["step"] if files.steps else None,
        "seed": found["seed"],
        "LEAP, ms a pruning step": None if files.leap_ms is None else f"{files.leap_ms:.3g}",
        "folder": files.folder.resolve(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _missing(files: RunFiles) -> list[str]:
    notes = [] if files.steps else ["There is no metrics.jsonl, so the course of the run is not shown."]
    return notes + ([] if files.scores else ["There is no scores.json, so scores are not shown."])


def _inlined(folder: Path | None, prefix: str) -> list[Any]:
    """The pictures in a run folder as parts of a page."""
    from markupsafe import Markup

    files = {name: folder / PLOTS / f"{name}.svg" for name in LABELS} if folder else {}
    return [
        Markup(inline(file, f"{prefix}{number}-", LABELS[name]))
        for number, (name, file) in enumerate(files.items())
        if file.is_file()
    ]


# ---------------------------------------------------------------------------------------------- several runs


def write_page(
    entries: Sequence[Entry],
    metric: str,
    title: str,
    picture: Picture | None,
    path: Path,
    notes: Sequence[str] = (),
    searched: Picture | None = None,
) -> None:
    """One page of several runs: a table to sort and filter, the picture of what was traded, and each run's details.

    searched: a picture of the settings of a search.

    Raises OSError if `path` cannot be written.
    """
    first = sorted(range(len(entries)), key=lambda number: not entries[number].front)
    detailed = set(first[:MOST_DETAILED])
    differing = _differing(entries)
    cells = [_cells(entry, metric, differing) for entry in entries]
    keys = dict.fromkeys(key for row in cells for key in row)  # none where there are no runs
    known = [key for key in keys if key not in differing and any(row[key] is not None for row in cells)]
    results = [key for key in (metric, "density", "Δ dense") if key in known]  # first: settings may be many
    columns = [Column("run", False), *map(Column, results), *(Column(key, False) for key in differing)]
    columns += [Column(key) for key in known if key not in results]
    best = sum(entry.front for entry in entries)
    page = _render(
        "runs.html",
        title=title,
        verdict=f"{len(entries)} runs, {best} of them on the Pareto front: no other in the same panel of the picture "
        f"has less density and a better {metric}.",
        picture=_drawn(picture, f"{metric} over density"),
        searched=_drawn(searched, f"{metric} over each setting that was searched", "searched"),
        choices={key: values for key, values in differing.items() if len(values) <= MOST_CHOICES},
        columns=columns,
        entries=[
            {
                "name": entry.name,
                "front": entry.front,
                "error": hide_secrets(entry.error),
                "cells": row,
                "choices": _choices(entry),
            }
            | _details(entry, number, number in detailed)
            for number, (entry, row) in enumerate(zip(entries, cells, strict=True))
        ],
        notes=notes,
    )
    write_text(path, page)


def _choices(entry: Entry) -> dict[str, str]:
    return {key: printable(text) for key, text in entry.settings.items()} | {"status": entry.status}


def _differing(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """The settings and statuses that are not the same in all runs, with their values in order of appearance."""
    keys = dict.fromkeys(key for entry in entries for key in _choices(entry))
    values = {key: list(dict.fromkeys(_choices(entry).get(key, "") for entry in entries)) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}


def _cells(entry: Entry, metric: str, differing: Iterable[str]) -> dict[str, Any]:
    """The cells of a run's row by title, but its name."""
    export = next(iter(exports(entry.folder)), None)
    difference = None if entry.value is None or entry.dense is None else entry.value - entry.dense
    return {key: _choices(entry).get(key, "") for key in differing} | {
        "target": entry.target,
        "density": entry.density,
        metric: entry.value,
        "Δ dense": difference,
        "weights kept": entry.kept,
        "parameters": export and export.parameters,
        "MB": export and export.bytes / 1e6,
        "latency, ms": export and export.latency,
        "LEAP, ms": entry.leap_ms,
        "seconds": entry.seconds,
    }


def _details(entry: Entry, number: int, pictures: bool) -> dict[str, Any]:
    """What is shown of a run on a click."""
    facts = {"status": entry.status, **entry.settings}
    facts |= {"folder": str(entry.folder)} if entry.folder else {}
    drawn = _inlined(entry.folder, f"r{number}-") if pictures else []
    parameters = {name: hide_secrets(text) for name, text in sorted(entry.parameters.items())}
    note = "" if drawn else "The pictures of this run are in its folder." if not pictures else "There are no pictures."
    return {"facts": facts, "pictures": drawn, "note": note, "parameters": parameters}


def _drawn(picture: Picture | None, label: str, prefix: str = "t") -> Any:
    from markupsafe import Markup

    if picture is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.svg"
        save(picture, file)
        return Markup(inline(file, f"{prefix}-", label))


# ---------------------------------------------------------------------------------------------- HTML


def _render(template: str, **context: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = formatted
    environment.finalize = lambda value: value if isinstance(value, Markup) else _readable(value)
    script, style = ((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fixed = {"script": Markup(script), "style": Markup(style), "script_hash": digest}
    return environment.get_template(template).render(**fixed, **context)


def _readable(value: Any) -> Any:
    """What turns the direction of writing, or is none of UTF-8, as an escape."""
    return printable(value) if isinstance(value, str) else value


def formatted(value: Any) -> str:
    """A value as it stands in a cell: "" for none, whole numbers in full, others to four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
