"""Block-sparse execution, measured: torch's own BSR product against the dense one, layer by layer, on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leap_dist.export.latency import medians

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS = ((32, 32), (16, 16))
BUDGET = 0.5  # seconds a layer


@dataclass(frozen=True)
class BlockTime:
    """One linear layer of (outputs, inputs): the density of its blocks, and milliseconds of a product."""

    name: str
    shape: tuple[int, int]
    density: float
    dense_ms: float
    sparse_ms: float

    @property
    def ratio(self) -> float:
        """Times as fast as dense; below 1 dense is faster."""
        return self.dense_ms / self.sparse_ms


def measure_blocks(
    model: PreTrainedModel, names: Sequence[str], block: tuple[int, int], tokens: int
) -> list[BlockTime]:
    """Time the linear layers that own the weights `names`, on `tokens` rows of random input, as BSR and dense.

    Of layers of one shape and block density (to one digit) only the first is timed. Left out: weights of no linear
    layer; those that `block` does not divide, or that have no block left; all, where torch was built without MKL,
    which has the product for processors.
    """
    times: dict[tuple[tuple[int, int], float], BlockTime] = {}
    modules = dict(model.named_modules())
    for name in names if torch.backends.mkl.is_available() else ():
        layer = modules.get(name.removesuffix(".weight"))  # none of experts, which are one tensor
        if not isinstance(layer, nn.Linear) or layer.out_features % block[0] or layer.in_features % block[1]:
            continue
        weight = layer.weight.detach()
        shape, density = (layer.out_features, layer.in_features), block_density(weight, block)
        if density > 0 and (shape, round(density, 1)) not in times:
            times[shape, round(density, 1)] = _time(name, weight, block, density, tokens)
    return list(times.values())


def block_density(weight: Tensor, block: tuple[int, int]) -> float:
    """Blocks with any weight left / blocks."""
    blocks = weight.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    return float((blocks != 0).any(dim=3).any(dim=1).float().mean())


def describe_blocks(times: Sequence[BlockTime], block: tuple[int, int], tokens: int) -> str:
    """One sentence on the ratio by density, and on what it means for an export."""
    shown = sorted(times, key=lambda time: time.density)
    ratios = "; ".join(f"density {t.density:.3g} of {t.shape[0]}x{t.shape[1]}: {t.ratio:.2f}" for t in shown)
    slower = [time for time in times if time.ratio < 1]
    verdict = "BSR is faster for all of them, the export is dense all the same"
    if slower:
        where = "" if len(slower) == len(times) else f" for {len(slower)} of {len(times)}"
        verdict = f"dense is faster{where}, the export stays dense"
    said = f"torch's BSR with {block[0]}x{block[1]} blocks at {tokens} tokens, times as fast as dense here"
    return f"{said}: {ratios}: {verdict}."


def _time(name: str, weight: Tensor, block: tuple[int, int], density: float, tokens: int) -> BlockTime:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse BSR tensor support is in beta")
        sparse = weight.to_sparse_bsr(block)
    inputs = {"input": torch.randn(tokens, weight.shape[1])}
    with torch.no_grad():
        milliseconds = medians(
            {
                "dense": lambda x: nn.functional.linear(x["input"], weight),
                "sparse": lambda x: nn.functional.linear(x["input"], sparse),
            },
            inputs,
            BUDGET,
        )
    rows, columns = weight.shape
    return BlockTime(name, (rows, columns), density, milliseconds["dense"], milliseconds["sparse"])
