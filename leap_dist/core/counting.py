"""Counting what is left: from weights and masks, never from thresholds."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLACK = 1e-6  # weights; float rounding of target * prunable


class Counter:
    """Counts and hashes weights against their masks, tensor by tensor, in name order.

    gates: one dict a gate; its "tensors" names the tensors whose weights it prunes. A masked tensor that no gate
    names (a bias that follows its row) is checked and hashed, but its elements are no prunable weights.
    hidden: packed masks (np.packbits, 1 = kept) that the weights do not tell: a kept weight is exactly zero there.
    """

    def __init__(self, gates: list[dict[str, Any]]) -> None:
        self._gates = gates
        self._counted = {name for gate in gates for name in gate["tensors"]}
        self._masks, self._weights = hashlib.sha256(), hashlib.sha256()
        self._tensors: dict[str, dict[str, Any]] = {}
        self.hidden: dict[str, Tensor] = {}

    def add(self, name: str, weight: Tensor, mask: Tensor | None) -> None:
        """Count one tensor of the model; `mask` (bool, the weight's shape) is None where no gate covers it.

        Raises RuntimeError if a pruned weight is not zero, or the mask does not fit.
        """
        self._weights.update(name.encode() + b"\0")
        self._weights.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if mask is None:
            return
        packed = np.packbits(mask.reshape(-1).numpy())
        self._masks.update(name.encode() + b"\0")
        self._masks.update(packed.data)
        self._tensors[name] = _count_tensor(name, weight, mask) | {"counted": name in self._counted}
        if self._tensors[name]["zeros_kept"]:
            self.hidden[name] = torch.from_numpy(packed)

    def result(self) -> dict[str, Any]:
        """kept, prunable, density, gates (each with its own), tensors (shape, numel, kept, density, zeros_kept,
        counted), masks_sha256 (utf-8 name, zero byte, np.packbits of the flat mask), weights_sha256 (name, zero byte,
        raw little-endian bytes). Raises RuntimeError if a gate's tensor was not seen."""
        if missing := sorted(self._counted - self._tensors.keys()):
            raise RuntimeError(f"gates prune {', '.join(missing)}, but no mask came for it")
        return {
            **_sum(self._tensors, self._counted),
            "gates": [gate | _sum(self._tensors, gate["tensors"]) for gate in self._gates],
            "tensors": self._tensors,
            "masks_sha256": self._masks.hexdigest(),
            "weights_sha256": self._weights.hexdigest(),
        }


def check_exact(kept: float, prunable: float, target: float, unit: float) -> None:
    """RuntimeError unless what is kept is the target's share of all, within one unit.

    As leap.measure counts: prunable weights, or all parameters, or FLOPs. unit: of the largest unit.
    """
    asked = target * prunable
    if not abs(kept - asked) <= unit + SLACK:
        raise RuntimeError(
            f"the density is not the target: kept {kept} of {prunable} weights ({kept / prunable:.6f}), "
            f"asked {asked:.1f} ({target}), allowed to differ by one unit of {unit}"
        )


def _count_tensor(name: str, weight: Tensor, mask: Tensor) -> dict[str, Any]:
    if weight.shape != mask.shape:
        raise RuntimeError(f"{name}: the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    zero = weight == 0
    if wrong := int((~mask & ~zero).sum()):
        raise RuntimeError(f"{name}: {wrong} pruned weights are not zero")
    kept = int(mask.sum())
    return {
        "shape": list(weight.shape),
        "numel": weight.numel(),
        "kept": kept,
        "density": _share(kept, weight.numel()),
        "zeros_kept": int((mask & zero).sum()),
    }


def _sum(tensors: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    kept, prunable = 0, 0
    for name in names:
        kept += tensors[name]["kept"]
        prunable += tensors[name]["numel"]
    return {"kept": kept, "prunable": prunable, "density": _share(kept, prunable)}


def _share(kept: int, numel: int) -> float:
    """kept / numel; nothing to prune counts as dense."""
    return kept / numel if numel else 1.0
