"""Triton versions of the ops on soft masks, of the signatures of their plain definitions in soft.py.

As in kernels.py a program works on one row of a table. Noise is drawn from the same counters as there, to the bit;
its logarithms may differ in the last one.
"""

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from leap_dist.ops.kernels import BLOCK, EXACT, _adamw, _load, _scalars
from leap_dist.ops.soft import BITS, FIRST, GOLDEN, SECOND, SUMS

STEP, ONE, TWO = tl.constexpr(GOLDEN), tl.constexpr(FIRST), tl.constexpr(SECOND)
HIGH = tl.constexpr(64 - BITS)
SMALLEST = tl.constexpr(2.0 ** -(BITS + 1))


@triton.jit
def _soft_mask(score, key, index, alpha, tau, bias):  # type: ignore[no-untyped-def]
    """M of scores with these indices, fp32 of shape (BLOCK,); key: int64."""
    mixed = index.to(tl.uint64) * STEP + key.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 30)) * ONE
    mixed = (mixed ^ (mixed >> 27)) * TWO
    mixed = mixed ^ (mixed >> 31)
    drawn = ((mixed >> HIGH).to(tl.int32).to(tl.float32) * 2.0 + 1.0) * SMALLEST
    noise = tl.log(drawn) - tl.log(1.0 - drawn)
    return tl.sigmoid(tl.div_rn(noise + alpha * score + bias, tau))


@triton.jit
def _write_kernel(  # type: ignore[no-untyped-def]
    table, keys, latent, score, hosted, sums, alpha, tau, bias, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """hosted = W * M on one row, and its sums."""
    row = tl.program_id(0).to(tl.int64)
    offset, length = tl.load(table + 4 * row), tl.load(table + 4 * row + 1)
    key, first = tl.load(keys + tl.load(table + 4 * row + 2)), tl.load(table + 4 * row + 3)
    kept, slope = tl.zeros((1,), dtype=tl.float64), tl.zeros((1,), dtype=tl.float64)
    of_masked, of_latent = tl.zeros((1,), dtype=tl.float64), tl.zeros((1,), dtype=tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        w = _load(latent, offset + at, inside)
        mask = _soft_mask(_load(score, offset + at, inside), key, first + at, alpha, tau, bias)
        mask = tl.where(inside, mask, 0.0)
        masked = w * mask
        tl.store(hosted + offset + at, masked, mask=inside)
        kept += tl.sum(mask, 0).to(tl.float64)
        slope += tl.sum(mask * (1.0 - mask), 0).to(tl.float64)
        of_masked += tl.sum(masked * masked, 0).to(tl.float64)
        of_latent += tl.sum(w * w, 0).to(tl.float64)
    place = sums + SUMS * row + tl.arange(0, 1)
    tl.store(place, kept)
    tl.store(place + 1, slope / tau)
    tl.store(place + 2, of_masked)
    tl.store(place + 3, of_latent)


@triton.jit
def _learn_kernel(  # type: ignore[no-untyped-def]
    table, keys, grad, latent, score, exp_avg, exp_avg_sq, masked, pulls,
    alpha, tau, bias, lerp, beta2, rest2, root2, eps, rate, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dL/dP = (G W + c + d W^2 M) M (1 - M) alpha / tau; with MASKED masked = G * M."""
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    key, first = tl.load(keys + gate), tl.load(table + 4 * row + 3)
    constant, of_square = tl.load(pulls + 2 * gate), tl.load(pulls + 2 * gate + 1)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        place = offset + at
        g, w, s = _load(grad, place, inside), _load(latent, place, inside), _load(score, place, inside)
        mask = _soft_mask(s, key, first + at, alpha, tau, bias)
        gradient = (g * w + constant + of_square * w * w * mask) * (mask * (1.0 - mask) * tl.div_rn(alpha, tau))
        s, m, v = _adamw(
            s, gradient, _load(exp_avg, place, inside), _load(exp_avg_sq, place, inside),
            lerp, beta2, rest2, root2, eps, rate
        )  # fmt: skip
        tl.store(score + place, s, mask=inside)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)
        if MASKED:
            tl.store(masked + place, g * mask, mask=inside)


def write_soft_(
    table: Tensor, keys: Tensor, latent: Tensor, score: Tensor, hosted: Tensor, curve: Sequence[float]
) -> Tensor:
    """As soft.write_soft_."""
    sums = torch.empty(len(table), SUMS, dtype=torch.float64, device=latent.device)
    if len(table):
        tensors = (table, keys, latent, score, hosted, sums)
        _write_kernel[(len(table),)](*tensors, *curve, SUMS=SUMS, BLOCK=BLOCK, **EXACT)
    return sums


def learn_soft_(
    table: Tensor,
    keys: Tensor,
    grad: Tensor,
    latent: Tensor,
    score: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    masked: Tensor | None,
    curve: Sequence[float],
    pulls: Tensor,
    adam: Sequence[float],
) -> None:
    """As soft.learn_soft_."""
    if len(table):
        written = grad if masked is None else masked  # of which nothing is written without one
        tensors = (table, keys, grad, latent, score, exp_avg, exp_avg_sq, written, pulls)
        scalars = (*curve, *_scalars(adam)[1:])
        _learn_kernel[(len(table),)](*tensors, *scalars, MASKED=masked is not None, BLOCK=BLOCK, **EXACT)
