"""Triton versions of the ops, of the signatures of their plain definitions in reference.py and units.py.

A program works on one row of a table (runs of at most dispatch.GPU_ROW elements), reads each operand once and writes
it once; offsets are int64. Nothing depends on the order of programs: a row's sums go to a place of its own and are
added up in the order of the rows, and only integers are added atomically. No GPU has run these kernels yet, so BLOCK
and the tiles are not tuned: they are checked by Triton's interpreter on the CPU, against float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from leap_dist.ops.reference import DIGIT_BITS, KEY_BITS, Adam

BLOCK = 1024
EXACT = {"enable_fp_fusion": False}  # no FMAs: an update with a mask of ones has the bits of the plain one


def _scalars(values: Sequence[float]) -> tuple[float, ...]:
    """(decay, lerp, beta2, rest2, root2, eps, rate) of `_adamw`, rounded once, from double."""
    adam = Adam(*values)
    correction1, correction2 = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    decay = 1 - adam.lr * adam.weight_decay
    rest = 1 - adam.beta1, adam.beta2, 1 - adam.beta2, math.sqrt(correction2), adam.eps, adam.lr / correction1
    return decay, *rest


@triton.jit
def _adamw(weight, grad, exp_avg, exp_avg_sq, lerp, beta2, rest2, root2, eps, rate):  # type: ignore[no-untyped-def]
    """m += (1 - b1) (g - m); v = b2 v + (1 - b2) g g; w -= rate m / (sqrt(v) / root2 + eps), fp32 of shape (BLOCK,)."""
    exp_avg += lerp * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root2) + eps
    return weight - tl.div_rn(rate * exp_avg, denominator), exp_avg, exp_avg_sq


@triton.jit
def _load(pointer, at, inside):  # type: ignore[no-untyped-def]
    """fp32 values, 0 outside."""
    return tl.load(pointer + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _plain_kernel(  # type: ignore[no-untyped-def]
    weight, grad, exp_avg, exp_avg_sq, numel, decay, lerp, beta2, rest2, root2, eps, rate, BLOCK: tl.constexpr
):
    """AdamW on `numel` elements, BLOCK a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    w, m, v = _adamw(
        _load(weight, at, inside) * decay, _load(grad, at, inside), _load(exp_avg, at, inside),
        _load(exp_avg_sq, at, inside), lerp, beta2, rest2, root2, eps, rate
    )  # fmt: skip
    tl.store(weight + at, w, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    table, grad, hosted, mask, others, latent, exp_avg, exp_avg_sq, score, score_exp_avg, score_exp_avg_sq, sigma,
    decay, lerp, beta2, rest2, root2, eps, rate, s_lerp, s_beta2, s_rest2, s_root2, s_eps, s_rate,
    WEIGHTS: tl.constexpr, SCORES: tl.constexpr, OTHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: with WEIGHTS of latent ones, dL/dW = G * M; with SCORES dL/dS = G * W * others and sum G * (W * M)."""
    row = tl.program_id(0).to(tl.int64)
    offset, length = tl.load(table + 4 * row), tl.load(table + 4 * row + 1)
    decay = tl.where(tl.load(table + 4 * row + 3) != 0, decay, 1.0)
    total = tl.zeros((1,), dtype=tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        at += offset
        g, w = _load(grad, at, inside), _load(latent, at, inside)
        if SCORES:
            total += tl.sum(g * _load(hosted, at, inside), 0).to(tl.float64)
            gradient = g * w
            if OTHERS:
                gradient *= _load(others, at, inside)
            s, sm, sv = _adamw(
                _load(score, at, inside), gradient, _load(score_exp_avg, at, inside),
                _load(score_exp_avg_sq, at, inside), s_lerp, s_beta2, s_rest2, s_root2, s_eps, s_rate
            )  # fmt: skip
            tl.store(score + at, s, mask=inside)
            tl.store(score_exp_avg + at, sm, mask=inside)
            tl.store(score_exp_avg_sq + at, sv, mask=inside)
        if WEIGHTS:
            w, m, v = _adamw(
                w * decay, g * _load(mask, at, inside), _load(exp_avg, at, inside), _load(exp_avg_sq, at, inside),
                lerp, beta2, rest2, root2, eps, rate
            )  # fmt: skip
            tl.store(latent + at, w, mask=inside)
            tl.store(exp_avg + at, m, mask=inside)
            tl.store(exp_avg_sq + at, v, mask=inside)
    if SCORES:
        tl.store(sigma + row + tl.arange(0, 1), total)


@triton.jit
def _shared_kernel(  # type: ignore[no-untyped-def]
    table, grad, hosted, mask, others, latent, exp_avg, exp_avg_sq, score, sigma,
    decay, lerp, beta2, rest2, root2, eps, rate, s_rate, OTHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: weights and scores by the moments of G alone; sum G * (W * M)."""
    row = tl.program_id(0).to(tl.int64)
    offset, length = tl.load(table + 4 * row), tl.load(table + 4 * row + 1)
    decay = tl.where(tl.load(table + 4 * row + 3) != 0, decay, 1.0)
    total = tl.zeros((1,), dtype=tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        at += offset
        g, w, m = _load(grad, at, inside), _load(latent, at, inside), _load(exp_avg, at, inside)
        total += tl.sum(g * _load(hosted, at, inside), 0).to(tl.float64)
        m += lerp * (g - m)
        v = beta2 * _load(exp_avg_sq, at, inside) + rest2 * g * g
        root = tl.div_rn(tl.sqrt_rn(v), root2)
        move = w * m
        if OTHERS:
            move *= _load(others, at, inside)
        s = _load(score, at, inside) - tl.div_rn(s_rate * move, tl.abs(w) * root + eps)
        w = w * decay - tl.div_rn(rate * (m * _load(mask, at, inside)), root + eps)
        tl.store(score + at, s, mask=inside)
        tl.store(latent + at, w, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(sigma + row + tl.arange(0, 1), total)


@triton.jit
def _write_kernel(table, latent, mask, hosted, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """hosted = W * M on one row."""
    row = tl.program_id(0).to(tl.int64)
    offset, length = tl.load(table + 4 * row), tl.load(table + 4 * row + 1)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        at += offset
        tl.store(hosted + at, _load(latent, at, inside) * _load(mask, at, inside), mask=inside)


@triton.jit
def _count_kernel(table, scores, bracket, counts, num_gates, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(above, inside) the bracket on one row."""
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    low, high = tl.load(bracket + gate), tl.load(bracket + num_gates + gate)
    num_above, num_inside = tl.zeros((1,), dtype=tl.int64), tl.zeros((1,), dtype=tl.int64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        within = at < length
        s = tl.load(scores + offset + at, mask=within, other=float("nan"))
        num_above += tl.sum((s > high).to(tl.int32), 0)
        num_inside += tl.sum(((s >= low) & (s <= high)).to(tl.int32), 0)
    tl.store(counts + 2 * row + tl.arange(0, 1), num_above)
    tl.store(counts + 2 * row + 1 + tl.arange(0, 1), num_inside)


@triton.jit
def _take_kernel(  # type: ignore[no-untyped-def]
    table, scores, bracket, firsts, taken, num_gates, BLOCK: tl.constexpr
):
    """The scores of one row that lie inside the bracket, from firsts[row] up to firsts[row + 1]."""
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    low, high = tl.load(bracket + gate), tl.load(bracket + num_gates + gate)
    first, last = tl.load(firsts + row), tl.load(firsts + row + 1)
    for start in range(0, tl.where(last > first, length, 0), BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offset + at, mask=at < length, other=float("nan"))
        inside = (s >= low) & (s <= high)
        number = tl.cumsum(inside.to(tl.int32), 0)
        tl.store(taken + first + number - 1, s, mask=inside)
        first += tl.sum(inside.to(tl.int32), 0)


@triton.jit
def _histogram_kernel(  # type: ignore[no-untyped-def]
    table, scores, base, room, prefix, counts, shift,
    WHOLE: tl.constexpr, DIGIT_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digits of the keys of one row; WHOLE: the first digit, which has no prefix.

    Only integers are added atomically, so that the order does not matter.
    """
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    first, left, known = tl.load(base + gate), tl.load(room + gate), tl.load(prefix + gate)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        bits = tl.load(scores + offset + at, mask=inside, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
        key = tl.where(bits >= 0, bits + 2147483648, -bits)
        heads = ((key - first) << left) >> shift
        if not WHOLE:
            inside &= (heads >> DIGIT_BITS) == known
        digit = heads & ((1 << DIGIT_BITS) - 1)
        tl.atomic_add(counts + (gate << DIGIT_BITS) + digit, tl.full((BLOCK,), 1, tl.int64), mask=inside)


@triton.jit
def _cut_kernel(table, scores, cuts, shares, mask, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """mask = score > cut on one row, and the first of those that equal it."""
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    cut, share = tl.load(cuts + gate), tl.load(shares + row)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        within = at < length
        s = tl.load(scores + offset + at, mask=within, other=float("nan"))
        tie = s == cut
        number = tl.cumsum(tie.to(tl.int32), 0)
        tl.store(mask + offset + at, ((s > cut) | (tie & (number <= share))).to(tl.int8), mask=within)
        share -= tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _best_of_kernel(table, scores, kept, mask, broken, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The n:m mask of one row; counts how many of its group go before an element, by m loads that meet in the cache."""
    row = tl.program_id(0).to(tl.int64)
    offset, length, gate = tl.load(table + 4 * row), tl.load(table + 4 * row + 1), tl.load(table + 4 * row + 2)
    of, num = tl.load(table + 4 * row + 3), tl.load(kept + gate)
    num_nan = tl.zeros((1,), dtype=tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        s = tl.load(scores + offset + at, mask=inside, other=0)
        num_nan += tl.sum((s != s).to(tl.int32), 0)
        rank = tl.zeros((BLOCK,), dtype=tl.int32)
        for i in range(of):
            place = at - at % of + i
            other = tl.load(scores + offset + place, mask=inside, other=0)
            rank += ((other > s) | ((other == s) & (place < at))).to(tl.int32)
        tl.store(mask + offset + at, (rank < num).to(tl.int8), mask=inside)
    tl.store(broken + row + tl.arange(0, 1), (num_nan > 0).to(tl.int8))


def adamw_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Sequence[float]) -> None:
    """As reference.adamw_."""
    if numel := weight.numel():
        grid = (triton.cdiv(numel, BLOCK),)
        _plain_kernel[grid](weight, grad, exp_avg, exp_avg_sq, numel, *_scalars(adam), BLOCK=BLOCK, **EXACT)


def masked_adamw_(
    table: Tensor,
    grad: Tensor,
    mask: Tensor,
    latent: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Sequence[float],
) -> None:
    """As reference.masked_adamw_."""
    states = (latent, exp_avg, exp_avg_sq)
    _update(table, grad, grad, mask, None, states, states, grad, adam, adam, weights=True, scores=False)


def element_adamw_(
    table: Tensor,
    grad: Tensor,
    hosted: Tensor,
    mask: Tensor,
    others: Tensor | None,
    latent: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    score: Tensor,
    score_exp_avg: Tensor,
    score_exp_avg_sq: Tensor,
    adam: Sequence[float],
    score_adam: Sequence[float],
) -> Tensor:
    """As reference.element_adamw_."""
    sigma = torch.empty(len(table), dtype=torch.float64, device=grad.device)
    states, scores = (latent, exp_avg, exp_avg_sq), (score, score_exp_avg, score_exp_avg_sq)
    _update(table, grad, hosted, mask, others, states, scores, sigma, adam, score_adam, weights=True, scores=True)
    return sigma


def score_adamw_(
    table: Tensor,
    grad: Tensor,
    hosted: Tensor,
    others: Tensor | None,
    latent: Tensor,
    score: Tensor,
    score_exp_avg: Tensor,
    score_exp_avg_sq: Tensor,
    score_adam: Sequence[float],
) -> Tensor:
    """As reference.score_adamw_."""
    sigma = torch.empty(len(table), dtype=torch.float64, device=grad.device)
    scores, unread = (score, score_exp_avg, score_exp_avg_sq), _unread_mask(others, grad)
    states = (latent, score_exp_avg, score_exp_avg_sq)  # of which the moments are not read
    flags = {"weights": False, "scores": True}
    _update(table, grad, hosted, unread, others, states, scores, sigma, score_adam, score_adam, **flags)
    return sigma


def shared_adamw_(
    table: Tensor,
    grad: Tensor,
    hosted: Tensor,
    mask: Tensor,
    others: Tensor | None,
    latent: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    score: Tensor,
    adam: Sequence[float],
    score_rate: float,
) -> Tensor:
    """As reference.shared_adamw_."""
    sigma = torch.empty(len(table), dtype=torch.float64, device=grad.device)
    if len(table):
        known, values = _bytes(mask if others is None else others), Adam(*adam)
        tensors = (table, grad, hosted, _bytes(mask), known, latent, exp_avg, exp_avg_sq, score, sigma)
        rate = score_rate / (1 - values.beta1**values.step)
        _shared_kernel[(len(table),)](
            *tensors, *_scalars(adam), rate, OTHERS=others is not None, BLOCK=BLOCK, **EXACT,
        )  # fmt: skip
    return sigma


def _unread_mask(others: Tensor | None, like: Tensor) -> Tensor:
    """Something of a mask's type for a kernel that does not read it."""
    return torch.empty(0, dtype=torch.bool, device=like.device) if others is None else others


def _update(
    table: Tensor,
    grad: Tensor,
    hosted: Tensor,
    mask: Tensor,
    others: Tensor | None,
    states: tuple[Tensor, ...],
    score_states: tuple[Tensor, ...],
    sigma: Tensor,
    adam: Sequence[float],
    score_adam: Sequence[float],
    **flags: bool,
) -> None:
    if len(table):
        known = _bytes(mask if others is None else others)
        tensors: tuple[Any, ...] = (table, grad, hosted, _bytes(mask), known, *states, *score_states, sigma)
        scalars = (*_scalars(adam), *_scalars(score_adam)[1:])
        _update_kernel[(len(table),)](
            *tensors, *scalars, WEIGHTS=flags["weights"], SCORES=flags["scores"], OTHERS=others is not None,
            BLOCK=BLOCK, **EXACT,
        )  # fmt: skip


def write_masked_(table: Tensor, latent: Tensor, mask: Tensor, hosted: Tensor) -> None:
    """As reference.write_masked_."""
    if len(table):
        _write_kernel[(len(table),)](table, latent, _bytes(mask), hosted, BLOCK=BLOCK, **EXACT)


def count_inside(table: Tensor, scores: Tensor, bracket: Tensor) -> Tensor:
    """As reference.count_inside."""
    counts = torch.empty(len(table), 2, dtype=torch.int64, device=scores.device)
    if len(table):
        _count_kernel[(len(table),)](table, scores, bracket, counts, bracket.shape[1], BLOCK=BLOCK, **EXACT)
    return counts


def take_inside(table: Tensor, scores: Tensor, bracket: Tensor, counts: Tensor) -> Tensor:
    """As reference.take_inside. How many they are is read back: one host sync."""
    firsts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    taken = scores.new_empty(int(firsts[-1]))
    if len(taken):
        _take_kernel[(len(table),)](table, scores, bracket, firsts, taken, bracket.shape[1], BLOCK=BLOCK, **EXACT)
    return taken


def histogram(table: Tensor, scores: Tensor, base: Tensor, room: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """As reference.histogram."""
    counts = base.new_zeros(len(prefix), 1 << DIGIT_BITS)
    if len(table):
        _histogram_kernel[(len(table),)](
            table, scores, base, room, prefix, counts, shift,
            WHOLE=shift + DIGIT_BITS >= KEY_BITS, DIGIT_BITS=DIGIT_BITS, BLOCK=BLOCK, **EXACT,
        )  # fmt: skip
    return counts


def cut_(table: Tensor, scores: Tensor, cuts: Tensor, shares: Tensor, mask: Tensor) -> None:
    """As reference.cut_."""
    if len(table):
        _cut_kernel[(len(table),)](table, scores, cuts, shares.contiguous(), _bytes(mask), BLOCK=BLOCK, **EXACT)


def best_of_(table: Tensor, scores: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """As reference.best_of_."""
    broken = torch.empty(len(table), dtype=torch.bool, device=scores.device)
    if len(table):
        _best_of_kernel[(len(table),)](table, scores, kept, _bytes(mask), _bytes(broken), BLOCK=BLOCK, **EXACT)
    return broken


def _bytes(mask: Tensor) -> Tensor:
    """A bool mask as bytes, which Triton loads and stores."""
    return mask.view(torch.uint8)
