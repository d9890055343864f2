"""The plain-torch definition of the optimizer's inner loops, over runs of elements in flat partitions.

Optimizer state has the shape of the flat partition, so a run is a row (offset, length, gate, decays) of an int64 table.
Rows are cut to a device's block size when the table is made: on the CPU a block of every operand stays in the cache,
on a GPU a row is one program. The arithmetic is elementwise: its results do not depend on how elements are cut into
rows or fragments; sums are taken row by row, in the order of the rows.

AdamW is Loshchilov and Hutter, arXiv 1711.05101, with the operations of torch.optim.AdamW in their order, so that it
gives the same bits. (torch's own fused CPU kernel takes other roots and contracts to FMAs: it does not.)
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK = 1 << 18  # 1 MiB in fp32: five operands fit the third-level cache, and threads meet seldom
OFFSET, LENGTH, GATE, DECAYS = range(4)  # columns of a table of runs
PLACE = DECAYS  # in the tables of a selection
DIGIT_BITS = 7  # of a key, chosen in one pass of a selection
KEY_BITS = 5 * DIGIT_BITS  # of an aligned key: 32 at least
KEYS = 1 << 15  # made at a time: a key and what is made of it take 60 bytes, where a score takes 4


class Adam(NamedTuple):
    """The scalars of one AdamW step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float


def cache_blocks(numel: int, device: torch.device) -> Iterator[slice]:
    """Cut a run of elements into cache blocks on the CPU; one block elsewhere."""
    size = CPU_BLOCK if device.type == "cpu" else max(numel, 1)
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def run_table(runs: Sequence[tuple[int, int, int, int]], size: int) -> Tensor:
    """The runs cut to rows of at most `size` elements, int64 of shape (rows, 4); an empty run has no row."""
    rows = [
        (offset + start, min(size, length - start), gate, last)
        for offset, length, gate, last in runs
        for start in range(0, length, size)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def runs_of(table: Tensor) -> Iterator[tuple[slice, int, bool]]:
    """(place in the flat partition, gate, decays) of every row."""
    for offset, length, gate, decays in table.tolist():
        yield slice(offset, offset + length), gate, bool(decays)


def _adamw_block_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: Tensor, adam: Adam
) -> None:
    """One AdamW step on one block, every tensor (n,); scratch is overwritten, grad is kept."""
    if exp_avg.dtype != weight.dtype:
        wide = exp_avg.to(weight.dtype), exp_avg_sq.to(weight.dtype)
        _adamw_block_(weight, grad, *wide, scratch, adam)
        exp_avg.copy_(wide[0])
        exp_avg_sq.copy_(wide[1])
        return
    if adam.weight_decay:
        weight.mul_(1 - adam.lr * adam.weight_decay)
    exp_avg.lerp_(grad, 1 - adam.beta1)
    exp_avg_sq.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    correction1 = 1 - adam.beta1**adam.step
    correction2 = 1 - adam.beta2**adam.step
    _root(exp_avg_sq, scratch).div_(math.sqrt(correction2)).add_(adam.eps)
    weight.addcdiv_(exp_avg, scratch, value=-(adam.lr / correction1))


def _root(square: Tensor, out: Tensor) -> Tensor:
    """The square root, and 1e-19 of 0: nothing beside an eps. A CPU takes five times as long for that of zeros, which
    pruned weights and unused words have."""
    return torch.clamp(square, min=torch.finfo(square.dtype).tiny, out=out).sqrt_()


def _masked_block_(
    latent: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    kept: Tensor,
    scratch: Tensor,
    adam: Adam,
) -> None:
    """AdamW on one block of latent weights with G * M; kept and scratch are overwritten."""
    _adamw_block_(latent, kept.copy_(mask).mul_(grad), exp_avg, exp_avg_sq, scratch, adam)


def _decayed(adam: Sequence[float], decays: bool) -> Adam:
    """The scalars of a run, with weight decay or without."""
    return Adam(*adam) if decays else Adam(*adam)._replace(weight_decay=0.0)


def _buffers(table: Tensor, like: Tensor, num: int) -> list[Tensor]:
    """Scratch for the longest row of a table, in the dtype of `like`."""
    longest = int(table[:, LENGTH].max()) if len(table) else 0
    return [torch.empty(longest, dtype=like.dtype, device=like.device) for _ in range(num)]


def adamw_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Sequence[float]) -> None:
    """One AdamW step; every tensor has shape (n,)."""
    scratch = torch.empty_like(weight[:CPU_BLOCK] if weight.device.type == "cpu" else weight)
    for b in cache_blocks(weight.numel(), weight.device):
        block = weight[b]
        _adamw_block_(block, grad[b], exp_avg[b], exp_avg_sq[b], scratch[: block.numel()], Adam(*adam))


def masked_adamw_(
    table: Tensor,
    grad: Tensor,
    mask: Tensor,
    latent: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Sequence[float],
) -> None:
    """AdamW on the latent weights with dL/dW = G * M, for every run; mask is bool, every tensor flat."""
    kept, scratch = _buffers(table, latent, 2)
    for b, _, decays in runs_of(table):
        num = b.stop - b.start
        moments = exp_avg[b], exp_avg_sq[b]
        _masked_block_(latent[b], grad[b], mask[b], *moments, kept[:num], scratch[:num], _decayed(adam, decays))


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
    """One step of an element gate's scores and of its latent weights, for every run.

        dL/dS = G * W * prod_{g' != g} M_g'    Adam on S
        dL/dW = G * M                          AdamW on W
        dL/dsigma = sum G * (W * M)            before both

    hosted: W * M; others: the product of the other gates' masks (None: all ones); mask, others: bool; every tensor but
    the table is flat. Returns every row's part of dL/dsigma, float64 of shape (rows,).
    """
    scores = score, score_exp_avg, score_exp_avg_sq
    sigma = torch.zeros(len(table), dtype=torch.float64, device=grad.device)
    gradients, scratches = _buffers(table, latent, 2)
    for row, (b, _, decays) in enumerate(runs_of(table)):
        gradient, scratch = gradients[: b.stop - b.start], scratches[: b.stop - b.start]
        sigma[row] = _score_block_(b, grad, hosted, others, latent, scores, gradient, scratch, Adam(*score_adam))
        moments = exp_avg[b], exp_avg_sq[b]
        _masked_block_(latent[b], grad[b], mask[b], *moments, gradient, scratch, _decayed(adam, decays))
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
    """The scores' part of `element_adamw_`, where the latent weights are frozen."""
    scores = score, score_exp_avg, score_exp_avg_sq
    sigma = torch.zeros(len(table), dtype=torch.float64, device=grad.device)
    gradients, scratches = _buffers(table, latent, 2)
    for row, (b, _, _) in enumerate(runs_of(table)):
        gradient, scratch = gradients[: b.stop - b.start], scratches[: b.stop - b.start]
        sigma[row] = _score_block_(b, grad, hosted, others, latent, scores, gradient, scratch, Adam(*score_adam))
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
    """As `element_adamw_`, but weights and scores share the moments m, v of G itself; hats: corrected for the start.

        S -= score_rate prod_{g' != g} M_g' W m^ / (|W| sqrt(v^) + eps)    G W has about the moments W m and W^2 v
        W -= lr M m^ / (sqrt(v^) + eps)                                    after its decay

    Both by the W of before. Where M = 1 everywhere this is AdamW on W to the bit.
    """
    sigma = torch.zeros(len(table), dtype=torch.float64, device=grad.device)
    buffers = _buffers(table, latent, 3)
    for row, (b, _, decays) in enumerate(runs_of(table)):
        sigma[row] = torch.dot(grad[b], hosted[b])
        scratch = [buffer[: b.stop - b.start] for buffer in buffers]
        own = latent[b], exp_avg[b], exp_avg_sq[b], score[b]
        rest = None if others is None else others[b]
        _shared_block_(grad[b], mask[b], rest, own, scratch, _decayed(adam, decays), score_rate)
    return sigma


def _shared_block_(
    grad: Tensor,
    mask: Tensor,
    others: Tensor | None,
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    scratch: Sequence[Tensor],
    adam: Adam,
    score_rate: float,
) -> None:
    """One block; states: weights, their gradient's two moments, scores; all of scratch is overwritten."""
    weight, exp_avg, exp_avg_sq, score = states
    root, move, size = scratch
    if exp_avg.dtype != weight.dtype:
        wide = exp_avg.to(weight.dtype), exp_avg_sq.to(weight.dtype)
        _shared_block_(grad, mask, others, (weight, *wide, score), scratch, adam, score_rate)
        exp_avg.copy_(wide[0])
        exp_avg_sq.copy_(wide[1])
        return
    exp_avg.lerp_(grad, 1 - adam.beta1)
    exp_avg_sq.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    correction1, correction2 = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    _root(exp_avg_sq, root).div_(math.sqrt(correction2))
    torch.mul(exp_avg, weight, out=move)
    if others is not None:
        move.mul_(size.copy_(others))
    torch.abs(weight, out=size).mul_(root).add_(adam.eps)
    score.addcdiv_(move, size, value=-(score_rate / correction1))
    if adam.weight_decay:
        weight.mul_(1 - adam.lr * adam.weight_decay)
    torch.mul(exp_avg, move.copy_(mask), out=move)
    weight.addcdiv_(move, root.add_(adam.eps), value=-(adam.lr / correction1))


def _score_block_(
    b: slice,
    grad: Tensor,
    hosted: Tensor,
    others: Tensor | None,
    latent: Tensor,
    scores: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    scratch: Tensor,
    adam: Adam,
) -> Tensor:
    """One block of scores and their moments; gradient and scratch are overwritten. Returns its part of dL/dsigma."""
    sigma = torch.dot(grad[b], hosted[b])
    torch.mul(grad[b], latent[b], out=gradient)
    if others is not None:
        gradient.mul_(scratch.copy_(others[b]))
    score, exp_avg, exp_avg_sq = (state[b] for state in scores)
    _adamw_block_(score, gradient, exp_avg, exp_avg_sq, scratch, adam)
    return sigma


def write_masked_(table: Tensor, latent: Tensor, mask: Tensor, hosted: Tensor) -> None:
    """hosted = W * M for every run, rounded to hosted's dtype; mask is bool, every tensor flat."""
    (kept,) = _buffers(table, latent, 1)
    for b, _, _ in runs_of(table):
        masked = kept[: b.stop - b.start].copy_(mask[b])
        if hosted.dtype == latent.dtype:
            torch.mul(latent[b], masked, out=hosted[b])
        else:
            hosted[b].copy_(masked.mul_(latent[b]))


def count_inside(table: Tensor, scores: Tensor, bracket: Tensor) -> Tensor:
    """How many scores of every run lie above the bracket of its gate and how many inside, int64 of shape (rows, 2).

    bracket: (2, G), low and high, both inside; scores fp32, flat. NaN lies nowhere.
    """
    counts = torch.zeros(len(table), 2, dtype=torch.int64, device=scores.device)
    lows, highs = bracket.tolist()
    for row, (run, gate, _) in enumerate(runs_of(table)):
        for b in cache_blocks(run.stop - run.start, scores.device):
            here = scores[run.start + b.start : run.start + b.stop]
            above = torch.count_nonzero(here > highs[gate])
            counts[row, 0] += above
            counts[row, 1] += torch.count_nonzero(here >= lows[gate]) - above
    return counts


def take_inside(table: Tensor, scores: Tensor, bracket: Tensor, counts: Tensor) -> Tensor:
    """The scores of every run that lie inside the bracket of its gate, row by row, in their order: fp32, flat.

    counts: how many these are in every row, int64 of shape (rows,); nothing is taken from a row that counts 0.
    """
    numbers = counts.tolist()
    taken = scores.new_empty(sum(numbers))
    lows, highs = bracket.tolist()
    first = 0
    for number, (run, gate, _) in zip(numbers, runs_of(table), strict=True):
        for b in cache_blocks(run.stop - run.start if number else 0, scores.device):
            here = scores[run.start + b.start : run.start + b.stop]
            found = here[_true_places((here >= lows[gate]).logical_and_(here <= highs[gate]))]
            taken[first : first + len(found)] = found
            first += len(found)
    return taken


def to_keys(scores: Tensor) -> Tensor:
    """fp32 -> int64 in [0, 2^32), in the same order and without a gap: -0.0 and 0.0 share a key."""
    bits = scores.view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -bits)


def histogram(table: Tensor, scores: Tensor, base: Tensor, room: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """How often each digit, bits [shift, shift + 7), stands in the keys whose higher bits are their gate's prefix.

    The key of a score is (to_keys(score) - base) << room, by its gate, of 35 bits; base, room, prefix: (G,), int64.
    The rows of the table cover the scores, fp32 and flat, one after the other. Returns int64 of shape (G, 128).
    """
    bins = 1 << DIGIT_BITS
    counts = torch.zeros(len(prefix) * bins, dtype=torch.int64, device=scores.device)
    starts = table[:, OFFSET]
    stops = starts + table[:, LENGTH]
    for first in range(0, len(scores), KEYS):
        here = scores[first : first + KEYS]
        own = (stops.clamp(max=first + len(here)) - starts.clamp(min=first)).clamp_(min=0)
        gates = torch.repeat_interleave(table[:, GATE], own, output_size=len(here))
        heads = ((to_keys(here) - base[gates]) << room[gates]) >> shift
        if shift + DIGIT_BITS < KEY_BITS:
            same = (heads >> DIGIT_BITS) == prefix[gates]
            heads, gates = heads[same], gates[same]
        counts += torch.bincount(gates * bins + (heads & (bins - 1)), minlength=len(counts))
    return counts.view(-1, bins)


def cut_(table: Tensor, scores: Tensor, cuts: Tensor, shares: Tensor, mask: Tensor) -> None:
    """mask = score > cut of its gate, and of those that equal it the first `shares` of every row.

    cuts: fp32 of shape (G,); shares: int64 of shape (rows,); scores fp32 and mask bool, flat.
    """
    values = cuts.tolist()
    for (run, gate, _), share in zip(runs_of(table), shares.tolist(), strict=True):
        for b in cache_blocks(run.stop - run.start, scores.device):
            here = slice(run.start + b.start, run.start + b.stop)
            if share >= b.stop - b.start:  # all that equal it, however many
                torch.ge(scores[here], values[gate], out=mask[here])
            else:
                torch.gt(scores[here], values[gate], out=mask[here])
            if 0 < share < run.stop - run.start:
                ties = scores[here] == values[gate]
                mask[here] |= ties.logical_and_(ties.cumsum(0, dtype=torch.int32) <= share)
                share -= int(torch.count_nonzero(ties))


def _true_places(flags: Tensor) -> Tensor:
    """The indices of the true among bool flags (n,), ascending; eight at a time where they are rare."""
    whole = flags.numel() // 8 * 8
    words = flags[:whole].view(torch.int64).nonzero().squeeze(1)
    if len(words) * 16 > whole:
        return flags.nonzero().squeeze(1)
    places = (words[:, None] * 8 + torch.arange(8, device=flags.device)).flatten()
    return torch.cat([places[flags[places]], flags[whole:].nonzero().squeeze(1).add_(whole)])


def best_of_(table: Tensor, scores: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """The n:m masks of every run, whose rows are (offset, length, gate, m): of every m neighbours the best are kept.

    kept: how many of a gate's neighbours, int64 of shape (G,); scores fp32 and mask bool, flat; a length is a multiple
    of its m. Ties go to the lowest index. Returns of every row whether its scores hold NaN, bool of shape (rows,).
    """
    broken = torch.zeros(len(table), dtype=torch.bool, device=scores.device)
    pairs: dict[tuple[int, int], list[Tensor]] = {}  # of rows of one length and m, of which there are few
    for row, (offset, length, gate, of) in enumerate(table.tolist()):
        run = scores[offset : offset + length]
        if (length, of) not in pairs:
            pairs[length, of] = _pairs(length, of, run.device)
        torch.lt(_ranks(run, pairs[length, of]), kept[gate], out=mask[offset : offset + length])
        broken[row] = not run.sum().isfinite() and run.isnan().any()  # a sum is ten times as fast
    return broken


def _pairs(length: int, of: int, device: torch.device) -> list[Tensor]:
    """For each distance from 1 to m - 1: 1 where an element and the one that far behind it are of one group, uint8."""
    place = torch.arange(of, device=device).repeat(length // of)
    return [(place[:-far] < of - far).view(torch.uint8) for far in range(1, of)]


def _ranks(run: Tensor, pairs: list[Tensor]) -> Tensor:
    """How many of its group go before an element, of run's shape: comparisons of neighbours in memory, and no sort."""
    rank = torch.zeros_like(run, dtype=torch.uint8 if len(pairs) < 255 else torch.int16)
    for far, inside in enumerate(pairs, start=1):
        later = (run[far:] > run[:-far]).view(torch.uint8).bitwise_and_(inside)
        rank[:-far] += later
        rank[far:] += later.bitwise_xor_(inside)
    return rank
