"""What an export loads in, and what to set for it to load in more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leap_dist.export import gguf
from leap_dist.export.shrunk import SHRUNK_TOLERANCE

if TYPE_CHECKING:
    from leap_dist.export.shrunk import Models

HUGGING_FACE, VLLM, LLAMA_CPP = "transformers AutoModel", "vLLM", "llama.cpp"
WITH_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
"""Beside the families of GGUF, models that vLLM was tried with."""
REMOVED = {
    "expert": ("Experts", "route tokens to them"),
    "depth": ("Layers", "compute their norms"),
    "hidden": ("Dimensions", "take the means of norms over all of them"),
}
"""What is gone by kind of unit, and what a stock model does with its zeros."""


@dataclass(frozen=True)
class Engine:
    """One engine: whether it loads the export, and how, or what to do so that it does."""

    name: str
    loads: bool
    note: str = ""


def stock_faults(granularities: Sequence[str], difference: float) -> list[tuple[str, str]]:
    """Of REMOVED, why a stock model with the run's zeros computes something else than the run measured; none if it
    does not. difference: of its logits, on random inputs, on which a router may choose among kept experts alone.
    """
    differs = difference > SHRUNK_TOLERANCE
    return [REMOVED[kind] for kind in granularities if kind in REMOVED and (differs or kind == "expert")]


def engines_of(kind: str, models: Models, difference: float | None) -> list[Engine]:
    """Of one kind of export, whose logits differ so from the run's; none for masks alone."""
    if kind in ("onnx", "int8"):
        return [Engine("onnxruntime", True)]
    if kind in gguf.KINDS:
        return [Engine(LLAMA_CPP, True, "and what is built on it")]
    if kind == "int8_torch":
        return [Engine(HUGGING_FACE, True, "with torchao")]
    if kind == "shrunk":
        return _of_shrunk(models)
    if kind == "hf":
        faults = stock_faults(models.run.granularities, difference or 0.0)
        wrong = "; ".join(f"{gone.lower()} were removed, it would still {does}: use shrunk" for gone, does in faults)
        note = wrong or "as large and as fast as the dense model"
        return [Engine(name, not wrong, note) for name in _hugging_face_folder(models)]
    if kind == "semi_structured":
        return [
            Engine("leap_dist.export.semi_structured.load_semi_structured", True),
            Engine(HUGGING_FACE, True, "dense"),
        ]
    return []


def _hugging_face_folder(models: Models) -> list[str]:
    """Engines that read the folder of a Hugging Face model; vLLM for families with which it was tried."""
    known = gguf.is_known(models.masked) or type(models.masked).__name__ in WITH_EXPERTS
    return [HUGGING_FACE, VLLM] if known else [HUGGING_FACE]


def _of_shrunk(models: Models) -> list[Engine]:
    stock = models.stock is not None
    note = "" if stock else f"no config of transformers describes it: {gguf.UNIFORM}"
    found = [Engine("leap_dist.load_pruned", True)]
    found += [Engine(name, stock, note) for name in _hugging_face_folder(models)]
    if gguf.is_known(models.masked):
        wrong = gguf.problem(models.stock or models.shrunk)
        found.append(Engine(LLAMA_CPP, wrong is None, wrong or "as --to gguf"))
    return found
