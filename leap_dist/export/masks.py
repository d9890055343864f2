"""Masks alone, one bit a weight: what was pruned, checked against the certificate.

masks.safetensors holds for every masked tensor the uint8 of np.packbits over its flat mask (1 = kept), masks.json the
shapes, the certificate's masks_sha256, and the order of columns that leap.permute made. mask.npz holds the same as
others publish masks: `<name>`, `<name>.__shape__` and, as JSON, `__meta__`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leap_dist.core.fixed import unpack
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.models.mask_files import INDEX, MARK, META, NPZ, PACKED, PERMUTED, SHAPE, load_masks
from leap_dist.run_folder import HIDDEN, ExportedWeights, Run

__all__ = ["load_masks", "masks_of", "save_masks"]


def save_masks(run: Run, folder: Path) -> int:
    """Write the masks of a run to `folder`; returns their bits. UserError if the run does not tell them."""
    packed: dict[str, Tensor] = {}

    def keep_packed() -> Iterator[tuple[str, Tensor]]:
        for name, mask in masks_of(run):
            packed[name] = torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))
            yield name, mask

    gates = [gate.model_dump() for gate in run.certificate.gates]
    found = cert.count(run.model, keep_packed(), gates)["masks_sha256"]
    if found != run.certificate.masks_sha256:
        raise UserError(
            f"{run.folder}: the masks have sha256 {found}, the certificate says {run.certificate.masks_sha256}; "
            "run the job again, or export hf instead"
        )
    shapes = {name: tensor.shape for name, tensor in run.certificate.tensors.items()}
    save_file(packed, folder / PACKED)
    permuted = run.certificate.permuted
    index = {"masks_sha256": found, "shapes": shapes, **({PERMUTED: permuted} if permuted else {})}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    meta = {"format": "numpy.packbits", "kept": 1, "density": run.certificate.density, "masks_sha256": found}
    arrays: dict[str, Any] = {name: mask.numpy() for name, mask in packed.items()}
    arrays |= {f"{name}{SHAPE}": np.array(shapes[name], dtype=np.int64) for name in packed}
    arrays[META] = np.array(json.dumps(meta))
    if permuted:
        arrays[MARK] = np.array(permuted)
    np.savez(folder / NPZ, **arrays)
    return sum(map(prod, shapes.values()))


def masks_of(run: Run) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, bool mask) in name order: where the weights are not zero.

    A kept weight that is exactly zero looks removed; tensors that have such have their masks in the run folder.
    UserError where that file does not hold them.
    """
    hidden = _read_hidden(run.folder)
    with ExportedWeights(run.model) as weights:
        for name, tensor in sorted(run.certificate.tensors.items()):
            nonzero = weights.read(name) != 0
            mask = nonzero if tensor.zeros_kept == 0 else _unpacked(hidden.get(name), nonzero.shape)
            if mask is None or int(mask.sum()) != tensor.kept or (nonzero & ~mask).any():
                raise UserError(
                    f"{name}: {tensor.zeros_kept} of its {tensor.kept} kept weights are exactly zero, as removed ones "
                    f"are, and {run.folder / HIDDEN} does not have its mask; run the job again, or export hf instead"
                )
            yield name, mask


def _read_hidden(folder: Path) -> dict[str, Tensor]:
    """Packed masks by name; none where no run wrote them."""
    path = folder / HIDDEN
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; run the job again, or export hf instead") from error


def _unpacked(packed: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask of that shape; None where these are not its bits."""
    if packed is None or packed.dtype != torch.uint8 or packed.shape != (-(-prod(shape) // 8),):
        return None
    return unpack(packed, 0, prod(shape)).view(shape)
