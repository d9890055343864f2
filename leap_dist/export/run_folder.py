"""A finished run folder, read and checked against its certificate."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from leap_dist.config.family import FamilyConfig
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.models.load import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESOLVED, MODEL, CERTIFICATE, CARD = "config.json", "model", "certificate.json", "card.json"
WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".data")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    """Of a certificate only what exports rely on is checked; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)


class GateCount(_Part):
    """One gate: what its units are, and the tensors whose weights it prunes."""

    granularity: str
    tensors: list[str]


class TensorCount(_Part):
    """One masked tensor. `zeros_kept`: its weights that are kept and yet exactly zero."""

    shape: list[int]
    kept: int
    zeros_kept: int


class Certificate(_Part):
    """certificate.json, as export/certificate.py builds it."""

    target: float
    density: float
    kept: int
    prunable: int
    metrics: dict[str, dict[str, float | None]]
    gates: list[GateCount]
    tensors: dict[str, TensorCount]
    masks_sha256: Sha256
    weights_sha256: Sha256


@dataclass(frozen=True)
class Run:
    """A finished run whose weights are those that its certificate was counted from."""

    folder: Path
    job: dict[str, Any]
    certificate: Certificate

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the pruned model, removed weights at zero."""
        return self.folder / MODEL

    @property
    def family(self) -> FamilyConfig | None:
        """How the job names heads, neurons and experts of an architecture that is in no table of ours."""
        section = self.job.get("family")
        return FamilyConfig.model_validate(section) if section else None

    @property
    def digest(self) -> dict[str, Any]:
        """What an export repeats of the certificate, to be recognised by."""
        names = ("target", "density", "masks_sha256", "weights_sha256")
        return {name: getattr(self.certificate, name) for name in names}

    @property
    def granularities(self) -> list[str]:
        """The kinds of units that were pruned, each once."""
        return list(dict.fromkeys(gate.granularity for gate in self.certificate.gates))


def read_run(folder: Path) -> Run:
    """Read a run folder of launch/prune.py. Raises UserError for one that is not finished, or not as it was left."""
    job = _read_job(folder)
    certificate = _read_certificate(folder)
    found = _weights_sha256(folder / MODEL)
    if found != certificate.weights_sha256:
        raise UserError(
            f"{folder / MODEL}: the weights are not those of the certificate: their sha256 is {found}, "
            f"{CERTIFICATE} says {certificate.weights_sha256}; restore the folder, or run the job again"
        )
    return Run(folder, job, certificate)


def _read_job(folder: Path) -> dict[str, Any]:
    """The resolved job file, by which a run folder is known."""
    if not folder.is_dir():
        raise UserError(f"RUN: got {folder}; there is no such folder")
    try:
        job = json.loads((folder / RESOLVED).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        job = None
    if not isinstance(job, dict) or not {"leap", "model"} <= job.keys():
        raise UserError(
            f"RUN: got {folder}; that folder is no run: it has no {RESOLVED} of a job; "
            "allowed: a folder that launch/prune.py wrote"
        )
    return job


def _read_certificate(folder: Path) -> Certificate:
    path = folder / CERTIFICATE
    if not path.is_file():
        raise UserError(
            f"{folder}: the run is not finished, it has no {CERTIFICATE}; finish it with "
            f"launch/prune.py --config {folder / RESOLVED} --output {folder} --resume"
        )
    try:
        return Certificate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: damaged: {place}: {first['msg']}; restore it, or run the job again") from error


def _weights_sha256(folder: Path) -> str:
    try:
        digest: str = cert.count(folder, [], [])["weights_sha256"]
    except (RuntimeError, SafetensorError, OSError, ValueError, LookupError) as error:
        problem = str(error).removeprefix(f"{folder}: ")
        raise UserError(
            f"{folder}: the weights cannot be read: {problem}; restore the folder, or run the job again"
        ) from error
    return digest


def load_exported(folder: Path) -> PreTrainedModel:
    """The model in a Hugging Face folder, with the class that its config names; fp32, on the CPU, for inference."""
    import transformers

    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, config.architectures[0])
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def load_exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model; None where the task needed none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def refuse_foreign(folder: Path) -> None:
    """UserError if an export cannot go to `folder`: something stands there that is no export."""
    if folder.exists() and not (folder / CARD).is_file():
        raise UserError(f"--output: {folder} exists and is no export; remove it, or choose another folder")
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output: {folder} cannot be made: {place} is no folder that can be written to")
