"""Run folders as a finished job leaves them, made without training, and a reader that holds pages to the rules."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LAYERS, HEADS = 12, 4
MATRICES = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
VOID = {"meta", "link", "input", "br"}


def steps() -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: 60 steps in three phases."""
    lines = []
    for step in range(2, 61, 2):
        phase = "dense" if step <= 20 else "prune" if step <= 40 else "settle"
        level = {"dense": 1.0, "prune": 1.0 - 0.025 * (step - 20), "settle": 0.5}[phase]
        line = {"step": step, "phase": phase, "loss": 1.0 / step, "level": level, "density": level, "remaining": level}
        lines.append(line | {"leap_ms_update": 2.0, "leap_ms_select": 1.0})
    return lines


def gates() -> list[dict[str, Any]]:
    """scores.json's: a head gate for each layer, and one of single weights."""
    kept, removed = [0] * 20 + [2] + [0] * 19, [0] * 19 + [2] + [0] * 20
    head = {"granularity": "head", "units": HEADS, "kept_units": 2, "which": [0, 3], "kept": kept, "removed": removed}
    named = [{"name": f"bert.encoder.layer.{layer}.attention.self:head", **head} for layer in range(LAYERS)]
    element = {"name": "pooler.weight:element", "granularity": "element", "units": 1000, "kept_units": 500}
    return [*named, {**element, "kept": [0] * 20 + [25] * 20, "removed": [25] * 20 + [0] * 20}]


def certificate(**changes: Any) -> dict[str, Any]:
    tensors = {
        f"bert.encoder.layer.{layer}.{matrix}.weight": {
            "shape": [8, 8], "numel": 64, "kept": 32, "density": 0.5, "zeros_kept": 0, "counted": True,
        }
        for layer in range(LAYERS)
        for matrix in MATRICES
    }  # fmt: skip
    bias = {"shape": [8], "numel": 8, "kept": 4, "density": 0.5, "zeros_kept": 1, "counted": False}
    tensors["bert.encoder.layer.0.output.dense.bias"] = bias
    counted = {"kept": 1536, "prunable": 3072, "density": 0.5}
    gate = {"name": "all <b>of it</b>", "granularity": "element", "units": 3072, "kept_units": 1536, **counted}
    gate["tensors"] = [name for name, tensor in tensors.items() if tensor["counted"]]
    return {
        "target": 0.5,
        "unit": 1,
        **counted,
        "metrics": {"dense": {"accuracy": 0.9, "loss": 0.1}, "pruned": {"accuracy": 0.8, "loss": None}},
        "gates": [gate],
        "tensors": tensors,
        "masks_sha256": "a" * 64,
        "weights_sha256": "b" * 64,
        "seed": 17,
        "versions": {"torch": "2.9"},
        **changes,
    }


def run_folder(folder: Path, **changes: Any) -> Path:
    """All files that are shown; the job has a password, and words that mean something in HTML."""
    folder.mkdir(parents=True)
    job = {"data": {"task": "</pre><script>alert(1)</script>"}, "leap": {"rule": "leap"}, "model": {"name": "a&b"}}
    job["tracking"] = {"mlflow_uri": "postgresql://me:secret@host/db"}
    (folder / "config.json").write_text(json.dumps(job))
    (folder / "certificate.json").write_text(json.dumps(certificate(**changes)))
    (folder / "scores.json").write_text(json.dumps({"reach": 4.0, "gates": gates()}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps()))
    return folder


def export_card(folder: Path, kind: str, latency: float | None) -> None:
    """The card of an export below a run folder; without a latency it holds no model to run."""
    from leap_dist.export.card import Card, Latency, Pair

    place = folder / "export" / kind
    place.mkdir(parents=True)
    card = Card(kind, 0.5, 0.5, {}, bytes=Pair(16000, 8000), machine={"processor": "a processor"})
    if latency is not None:
        times = [Latency("torch", 1, 1, 16, 9.0, latency), Latency("torch", 1, 32, 16, 90.0, 50.0)]
        card = replace(card, parameters=Pair(4000, 2000), latency=times)
    card.write(place)


class Page(HTMLParser):
    """Reads a page and asserts that it is well formed, refers to nothing outside, and runs its own script alone."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id twice"
        assert set(self.used) <= set(self.ids), f"refer to nothing: {set(self.used) - set(self.ids)}"
        (script,) = self.scripts
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'" in self.policy and f"script-src 'sha256-{digest}'" in self.policy

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attrs:
            value = value or ""
            assert not name.startswith("on"), f"a handler: {name}"
            if name in ("href", "xlink:href", "src"):
                assert value.startswith(("#", "data:")), f"refers to {value}"
            self.ids += [value] if name == "id" else []
            self.used += re.findall(r"url\(#([^)]+)\)", value)
            self.used += [value[1:]] if name.endswith("href") and value.startswith("#") else []
            if name == "content" and "default-src" in value:
                self.policy = value

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data
