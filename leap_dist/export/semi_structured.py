"""2:4 sparsity: of every 4 neighbours along the input dimension at most 2 are left, as sparse tensor cores take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leap_dist.config.json_file import read_json
from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported
from leap_dist.run_folder import ExportedWeights, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKER = "semi_structured.json"


def check_semi_structured(run: Run) -> list[str]:
    """Names of the gated matrices, all of which are 2:4. UserError that names those that are not, or if none is."""
    names = list(dict.fromkeys(name for gate in run.certificate.gates for name in gate.tensors))
    if not names:
        raise UserError(
            f"--to semi_structured: got {run.folder}, of which no matrix was pruned; allowed: a run with "
            '"gates": ["2:4"]; prune the model so, or choose another kind'
        )
    problems = []
    with ExportedWeights(run.model) as weights:
        for name in names:
            weight = weights.read(name)
            if weight.dim() != 2 or weight.shape[1] % 4:
                problems.append(f"{name} is {tuple(weight.shape)}, no matrix with a multiple of 4 inputs")
            elif wrong := crowded_groups(weight):
                problems.append(f"{name} has {wrong} of {weight.numel() // 4} groups with 3 or 4")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            "--to semi_structured: the model is not 2:4 sparse; allowed: at most 2 weights left of every 4 neighbours "
            f"along the input dimension of a gated matrix; {'; '.join(problems[:3])}{more}; choose another kind"
        )
    return names


def crowded_groups(weight: Tensor) -> int:
    """Groups of 4 along the input dimension of (outputs, inputs) with more than 2 weights left."""
    return int(((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) > 2).sum())


def write_marker(folder: Path, names: list[str]) -> None:
    """Note beside an exported model which of its matrices are 2:4."""
    (folder / MARKER).write_text(json.dumps({"tensors": names}, indent=2) + "\n", "utf-8")


def load_semi_structured(folder: Path, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """The model of a semi_structured export: on a GPU in `dtype` with 2:4 weights, on the CPU dense in fp32.

    On a GPU the marked weights of linear layers become torch's SparseSemiStructuredTensor where their shape fits its
    kernels; for inference only. That half has not been run: no GPU has seen it yet, only its CPU half is tested.
    """
    try:
        names: list[str] = read_json(folder / MARKER)["tensors"]
    except (ValueError, LookupError) as error:
        raise UserError(f"{folder}: is not a semi_structured export: it has no readable {MARKER}") from error
    model = load_exported(folder)
    if not torch.cuda.is_available():
        return model
    nn.Module.to(model, device="cuda")
    for weight in model.parameters():  # buffers stay in fp32, as those of rotary embeddings have to
        weight.data = weight.data.to(dtype)
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, nn.Linear) and _fits(layer.weight):
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _fits(weight: Tensor) -> bool:
    """Whether the kernels take the shape: rows by 32, columns by 64 (two-byte types) or 32 (fp32)."""
    rows, columns = weight.shape
    return rows % 32 == 0 and columns % (64 if weight.element_size() == 2 else 32) == 0
