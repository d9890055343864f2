"""The card of an export: what it is, how much smaller and how much faster, as JSON and as a page to read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from leap_dist.core.measure import amounts, said_of
from leap_dist.export import gguf
from leap_dist.export.engines import Engine
from leap_dist.export.metric import Judged
from leap_dist.export.vocabulary import Vocabulary
from leap_dist.models.flops import Flops
from leap_dist.run_folder import CARD, sealed
from leap_dist.run_parts import Certificate

README = "README.md"
TITLES = {
    "hf": "pruned model, removed weights at zero",
    "shrunk": "pruned model, removed structures gone",
    "onnx": "pruned model as ONNX, removed structures gone",
    "mask": "masks of a pruned model",
    "semi_structured": "2:4 sparse model",
    "gguf": "pruned model for llama.cpp, removed structures gone",
    "gguf_q8_0": "pruned model for llama.cpp in 8 bits, removed structures gone",
    "gguf_q4_k_m": "pruned model for llama.cpp in 4 to 6 bits, removed structures gone",
    "int8": "pruned model as ONNX in 8 bits, removed structures gone",
    "int8_torch": "pruned model in 8 bits by torchao, removed structures gone",
}


@dataclass(frozen=True)
class Pair:
    """A measure of the dense model and of the export."""

    before: float
    after: float


@dataclass(frozen=True)
class Share:
    """What the target of a run is a share of, in words, and the share that the run came to."""

    of: str
    reached: float


def share_of(certificate: Certificate) -> Share | None:
    """None of a target that is the density."""
    found = certificate.model_dump()
    if not found["measure"]:
        return None
    kept, total = amounts(found, found["measure"])
    return Share(said_of(found), kept / total)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, dense in torch and the export in `engine`, at one batch and length."""

    engine: str
    threads: int
    batch: int
    length: int
    before: float
    after: float


@dataclass(frozen=True)
class Card:
    """All of it. None where an export holds no model to run; sizes are of weight files, counts of all parameters."""

    kind: str
    target: float
    density: float
    metrics: dict[str, dict[str, float | None]]
    bytes: Pair
    parameters: Pair | None = None
    flops_before: Flops | None = None
    flops_after: Flops | None = None
    latency: list[Latency] = field(default_factory=list)
    logit_difference: float | None = None
    notes: list[str] = field(default_factory=list)
    masks_sha256: str = ""
    weights_sha256: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    """The hub id of the model that the run started from, if it has one."""
    engines: list[Engine] = field(default_factory=list)
    """What loads it, and what would if the run were set otherwise."""
    vocabulary: Vocabulary | None = None
    """What was kept of the tokens, where the vocabulary was cut."""
    judged: Judged | None = None
    """Metrics in fp32 and of this export, of a kind with fewer bits."""
    share: Share | None = None
    """What the target is a share of, if that is not the prunable weights."""

    def write(self, folder: Path) -> None:
        """card.json and README.md."""
        (folder / CARD).write_text(json.dumps(sealed(asdict(self)), indent=2) + "\n", "utf-8")
        (folder / README).write_text(self.page(), "utf-8")

    def page(self) -> str:
        """The card as Markdown, under what the hub reads of it."""
        title = TITLES[self.kind] if self.target < 1 else "model that no run pruned"
        lines = [*self._hub_lines(), f"# {self.kind}: {title}", ""]
        lines += [self._pruned(), ""] if self.target < 1 else []
        lines += ["| | dense | this export | ratio |", "|---|---|---|---|", *map(_row, self._measures()), ""]
        lines += [f"- {note}" for note in self._notes()]
        if self.engines:
            lines += ["", "| engine | loads this export | note |", "|---|---|---|"]
            lines += [f"| {engine.name} | {_yes(engine.loads)} | {engine.note} |" for engine in self.engines]
        return "\n".join(lines) + "\n"

    def _pruned(self) -> str:
        """How much is left, and how much was asked for."""
        density, target = f"density of {self.density:.4f}", f"(target {self.target:g})"
        if self.share is None:
            return f"Pruned to a {density} {target} of the prunable weights."
        return f"Pruned to a {self.share.of} of {self.share.reached:.4f} {target}, a {density} of the prunable weights."

    def row(self) -> dict[str, str | float]:
        """The card as a line of the table that a launcher prints."""
        cells: dict[str, str | float] = {"export": self.kind, "weights MB": _change(self.bytes, 1e-6)}
        if self.vocabulary:
            cells["tokens"] = _change(Pair(self.vocabulary.before, self.vocabulary.after), 1)
        cells["parameters"] = _change(self.parameters, 1) if self.parameters else ""
        if self.flops_before and self.flops_after:
            cells["MFLOPs/token"] = _change(Pair(self.flops_before.total, self.flops_after.total), 1e-6)
        for time in self.latency:
            cells[f"ms at {time.batch}x{time.length}"] = _change(Pair(time.before, time.after), 1)
        if self.logit_difference is not None:
            cells["logits differ"] = f"{self.logit_difference:.1e}"
        return cells

    def engine_rows(self) -> list[dict[str, str | float]]:
        """Lines of the table of engines that a launcher prints."""
        return [
            {"export": self.kind, "engine": engine.name, "loads": _yes(engine.loads), "note": engine.note}
            for engine in self.engines
        ]

    def _hub_lines(self) -> list[str]:
        """YAML, as a model card on the Hugging Face hub begins."""
        by_kind = {"onnx": "onnx", "int8": "onnx", **dict.fromkeys(gguf.KINDS, "gguf")}
        library = by_kind.get(self.kind, "transformers")
        base = [f"base_model: {json.dumps(self.base_model)}"] if self.base_model else []
        return ["---", f"library_name: {library}", *base, "tags: [pruning, leap]", "---", ""]

    def _measures(self) -> list[tuple[str, Pair, str]]:
        """(name, values, format) of the table."""
        found = [("weights on disk, bytes", self.bytes, ",.0f")]
        if self.parameters:
            found.append(("parameters", self.parameters, ",.0f"))
        if self.flops_before and self.flops_after:
            before, after = self.flops_before, self.flops_after
            found.append(("FLOPs per token, linear layers", Pair(before.linear, after.linear), ",.0f"))
            name = f"FLOPs per token, attention products at length {before.length}"
            found.append((name, Pair(before.attention, after.attention), ",.0f"))
        for time in self.latency:
            name = f"latency, batch {time.batch}, length {time.length}, ms"
            found.append((name, Pair(time.before, time.after), ".2f"))
        return found

    def _notes(self) -> list[str]:
        """What the numbers mean, and what to know before using the export."""
        notes = list(self.notes)
        if self.metrics:
            shown = [f"{name} {_metrics(values)}" for name, values in self.metrics.items()]
            notes.append(f"Measured by the run: {'; '.join(shown)}.")
        if self.latency:
            engine, threads = self.latency[0].engine, self.latency[0].threads
            where = f"{self.machine['processor']}, {threads} thread{'s' * (threads > 1)}"
            notes.append(
                f"Latency: interleaved medians on {where}; dense with random weights in torch, this in {engine}."
            )
        return notes


def _row(measure: tuple[str, Pair, str]) -> str:
    name, pair, form = measure
    ratio = f"{pair.after / pair.before:.3f}" if pair.before else ""
    return f"| {name} | {pair.before:{form}} | {pair.after:{form}} | {ratio} |"


def _yes(loads: bool) -> str:
    return "yes" if loads else "no"


def _change(pair: Pair, scale: float) -> str:
    """ "12.3 → 4.56" """
    before, after = (_short(value * scale) for value in (pair.before, pair.after))
    return before if before == after else f"{before} → {after}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _metrics(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
