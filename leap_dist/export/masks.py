"""Masks alone, one bit a weight: what was pruned, checked against the certificate.

masks.safetensors holds for every masked tensor the uint8 of np.packbits over its flat mask (1 = kept), masks.json the
shapes, the certificate's masks_sha256, and whether the run put columns in another order. mask.npz holds the same as
others publish masks: `<name>`, `<name>.__shape__` and, as JSON, `__meta__`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.models.mask_files import INDEX, MARK, META, NPZ, PACKED, PERMUTED, SHAPE, load_masks
from leap_dist.run_folder import PERMUTATION, ExportedWeights, Run
from leap_dist.run_parts import TensorCount

__all__ = ["load_masks", "masks_of", "save_masks"]


def save_masks(run: Run, folder: Path) -> int:
    """Write the masks of a run to `folder`; returns their bits. UserError if the weights do not tell them."""
    packed: dict[str, Tensor] = {}

    def keep_packed() -> Iterator[tuple[str, Tensor]]:
        for name, mask in masks_of(run):
            packed[name] = torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))
            yield name, mask

    gates = [gate.model_dump() for gate in run.certificate.gates]
    found = cert.count(run.model, keep_packed(), gates)["masks_sha256"]
    if found != run.certificate.masks_sha256:
        raise UserError(
            f"{run.folder}: the masks read from the weights have sha256 {found}, the certificate says "
            f"{run.certificate.masks_sha256}: kept weights that are exactly zero hide the mask; export hf instead"
        )
    shapes = {name: tensor.shape for name, tensor in run.certificate.tensors.items()}
    save_file(packed, folder / PACKED)
    permuted = (run.folder / PERMUTATION).is_file()
    index = {"masks_sha256": found, "shapes": shapes, **({PERMUTED: True} if permuted else {})}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    meta = {"format": "numpy.packbits", "kept": 1, "density": run.certificate.density, "masks_sha256": found}
    arrays: dict[str, Any] = {name: mask.numpy() for name, mask in packed.items()}
    arrays |= {f"{name}{SHAPE}": np.array(shapes[name], dtype=np.int64) for name in packed}
    arrays[META] = np.array(json.dumps(meta))
    if permuted:
        arrays[MARK] = np.array(True)
    np.savez(folder / NPZ, **arrays)
    return sum(map(prod, shapes.values()))


def masks_of(run: Run) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, bool mask) in name order, read from the weights.

    A kept weight that is exactly zero looks removed. Where the certificate counts such weights the mask is filled up
    to whole units, if that gives the count; the hash over all masks decides. UserError where no way gives the count.
    """
    blocks = {
        name: tuple(map(int, found.groups()))
        for gate in run.certificate.gates
        for name in gate.tensors
        if (found := re.fullmatch(r"block:(\d+)x(\d+)", gate.granularity))
    }
    with ExportedWeights(run.model) as weights:
        for name, tensor in sorted(run.certificate.tensors.items()):
            yield name, _mask(name, weights, tensor, blocks.get(name))


def _mask(name: str, weights: ExportedWeights, tensor: TensorCount, block: tuple[int, ...] | None) -> Tensor:
    nonzero = weights.read(name) != 0
    if int(nonzero.sum()) == tensor.kept:
        return nonzero
    candidates = [torch.ones_like(nonzero), _whole_slices(nonzero)]
    if block is not None and nonzero.dim() == 2:
        candidates.append(_whole_blocks(nonzero, block))
    matrix = name.removesuffix("bias") + "weight"
    if nonzero.dim() == 1 and matrix in weights.names():
        candidates.append((weights.read(matrix) != 0).flatten(1).any(dim=1))
    for mask in candidates:
        if mask.shape == nonzero.shape and int(mask.sum()) == tensor.kept and not (nonzero & ~mask).any():
            return mask
    raise UserError(
        f"{name}: {tensor.zeros_kept} of its {tensor.kept} kept weights are exactly zero, as removed ones are: "
        "its mask cannot be read from the weights; export hf instead"
    )


def _whole_slices(nonzero: Tensor) -> Tensor:
    """Along every axis an index is kept whole or not at all: rows, columns, heads, neurons, experts."""
    mask = torch.ones_like(nonzero)
    for axis in range(nonzero.dim()):
        others = [other for other in range(nonzero.dim()) if other != axis]
        mask &= nonzero.any(dim=others, keepdim=True) if others else nonzero
    return mask


def _whole_blocks(nonzero: Tensor, block: tuple[int, ...]) -> Tensor:
    """Blocks of rows x columns, cut off at the edges, are kept whole or not at all."""
    (rows, columns), (height, width) = nonzero.shape, block
    padded = nonzero.new_zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = nonzero
    alive = padded.view(padded.shape[0] // height, height, -1, width).any(dim=3).any(dim=1)
    return alive.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
