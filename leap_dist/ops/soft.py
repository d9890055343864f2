"""Soft masks of rule "gumbel", in plain torch: M = sigmoid((alpha P + b + g) / tau), g logistic noise.

Of n:m gates every group of m neighbours chooses among its patterns c with n ones, as MaskLLM (Fang et al., arXiv
2409.17481) does: y = softmax((alpha sum_i c_i P_i + g_c) / tau) with Gumbel noise g, and M = sum_c y_c c.

Nothing of M is kept: the noise is drawn from a counter, so that the update draws again what the forward pass met. It
is that of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a mix of key + index * golden ratio, so that an element's
noise depends on its place in its tensor alone, on any number of ranks and however it is cut.
Tables of runs are as in reference.py, with the element's index in its tensor as the last column. `write_soft_` and
`learn_soft_` have Triton versions in soft_kernels.py.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.ops.reference import adamw_, run_table

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64
BITS = 23  # of a uniform number, so that it, and one minus it, are exact in fp32
MOST_AT_ONCE = 1 << 22  # numbers: their counters take 8 bytes each
FEW_AT_ONCE = 1 << 15  # on a CPU, whose second-level cache then holds them from pass to pass
SUMS = 4  # columns of what `write_soft_` returns


class Curve(NamedTuple):
    """How scores become masks in one step; the key of its noise is `key` and the number of the gate.

    choice: in place of alpha where a pattern of n in m weights is chosen.
    """

    alpha: float
    tau: float
    bias: float
    key: int
    choice: float

    def scalars(self) -> list[float]:
        """As `write_soft_` and `learn_soft_` take them."""
        return [self.alpha, self.tau, self.bias]


def noise_key(*numbers: int) -> int:
    """A 64-bit key of a few numbers: seed, step, gate."""
    key = 0
    for number in numbers:
        key = (key + number * GOLDEN + GOLDEN) % WORD
        key = (key ^ (key >> 30)) * FIRST % WORD
        key = (key ^ (key >> 27)) * SECOND % WORD
        key ^= key >> 31
    return key


def uniform(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """Uniform numbers of the indices first .. first + num - 1, fp32 of shape (num,), inside (0, 1)."""
    return _uniform(key, torch.arange(first, first + num, device=device))


def _uniform(key: int, index: Tensor) -> Tensor:
    """Those of indices, which are written over."""
    mixed = index.mul_(_signed(GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed ^= _shifted(mixed, shift)
        mixed *= _signed(factor)
    mixed ^= _shifted(mixed, 31)
    return _shifted(mixed, 64 - BITS).float().mul_(2.0**-BITS).add_(2.0 ** -(BITS + 1))


def logistic(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """Logistic noise: log(u) - log(1 - u) of `uniform`."""
    drawn = uniform(key, first, num, device)
    return torch.log(drawn).sub_(torch.log1p(-drawn))


def gumbel(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """Gumbel noise: -log(-log(u)) of `uniform`."""
    return _gumbel(key, torch.arange(first, first + num, device=device))


def _gumbel(key: int, index: Tensor) -> Tensor:
    return _uniform(key, index).log_().neg_().log_().neg_()


def normal(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """Numbers of mean 0 and deviation 1, fp32 of shape (num,)."""
    return torch.special.ndtri(uniform(key, first, num, device))


def _signed(word: int) -> int:
    """The same 64 bits as an int64 holds them."""
    return word - WORD if word >= WORD // 2 else word


def _shifted(words: Tensor, shift: int) -> Tensor:
    """To the right, zeros coming in."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def at_once(device: torch.device) -> int:
    """Numbers to draw in one go."""
    return FEW_AT_ONCE if device.type == "cpu" else MOST_AT_ONCE


def noise_keys(key: int, num_gates: int, device: torch.device) -> Tensor:
    """The key of every gate's noise, int64 of shape (num_gates,)."""
    return torch.tensor([_signed(noise_key(key, gate)) for gate in range(num_gates)], dtype=torch.int64, device=device)


def soft_masks(score: Tensor, gate: int, first: int, curve: Curve) -> Tensor:
    """M of scores with the indices first .. of gate number `gate`: fp32 of shape (num,)."""
    return _masks(score, noise_key(curve.key, gate), first, curve.scalars())


def _masks(score: Tensor, key: int, first: int, curve: Sequence[float]) -> Tensor:
    alpha, tau, bias = curve
    noise = logistic(key, first, len(score), score.device)
    return noise.add_(score, alpha=alpha).add_(bias).div_(tau).sigmoid_()


def numbered_table(runs: Sequence[tuple[int, int, int, int]], size: int) -> Tensor:
    """Runs (offset, length, gate, first index) cut to rows of at most `size`, by gate; int64 of shape (rows, 4)."""
    rows = []
    for offset, length, gate, first in sorted(runs, key=lambda run: run[2]):
        cut = run_table([(offset, length, gate, 0)], size).tolist()
        rows += [(place, num, gate, first + place - offset) for place, num, _, _ in cut]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def write_soft_(
    table: Tensor, keys: Tensor, latent: Tensor, score: Tensor, hosted: Tensor, curve: Sequence[float]
) -> Tensor:
    """hosted = W * M for every row; tensors are flat, hosted may be of another dtype.

    keys: of `noise_keys`; curve: (alpha, tau, bias). Returns every row's (sum M, sum dM/db, sum (W M)^2, sum W^2),
    float64 of shape (rows, 4).
    """
    sums, numbers = [], keys.tolist()
    for offset, length, gate, first in table.tolist():
        b = slice(offset, offset + length)
        mask = _masks(score[b], numbers[gate], first, curve)
        masked = latent[b] * mask
        hosted[b].copy_(masked)
        slope = torch.dot(mask, 1.0 - mask) / curve[1]
        parts = mask.sum(dtype=torch.float64), slope, torch.dot(masked, masked), torch.dot(latent[b], latent[b])
        sums.append(torch.stack([part.double() for part in parts]))
    return torch.stack(sums) if sums else torch.zeros(0, SUMS, dtype=torch.float64, device=latent.device)


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
    """Adam on the scores of every row, with M as in the forward pass, and masked = G * M where it is given.

        dL/dP = (G W + c_g + d_g W^2 M) M (1 - M) alpha / tau

    pulls: (c, d) of every gate, fp32 of shape (gates, 2), which come from a regulariser.
    """
    numbers, (alpha, tau, _), pairs = keys.tolist(), curve, pulls.tolist()
    for offset, length, gate, first in table.tolist():
        b = slice(offset, offset + length)
        mask = _masks(score[b], numbers[gate], first, curve)
        gradient = grad[b] * latent[b]
        constant, of_square = pairs[gate]
        if constant or of_square:
            gradient += constant + of_square * latent[b] ** 2 * mask
        gradient *= mask * (1.0 - mask) * (alpha / tau)
        if masked is not None:
            torch.mul(grad[b], mask, out=masked[b])
        adamw_(score[b], gradient, exp_avg[b], exp_avg_sq[b], adam)


def patterns_of(kept: int, of: int, device: torch.device) -> Tensor:
    """All patterns with `kept` ones, fp32 of shape (patterns, of), in the order of their places."""
    places = torch.tensor(list(combinations(range(of), kept)), device=device)
    return torch.zeros(len(places), of, device=device).scatter_(1, places, 1.0)


def choose(score: Tensor, patterns: Tensor, gate: int, first: int, curve: Curve) -> Tensor:
    """y of the groups first .. of gate number `gate`; score: (groups, m), y: (patterns, groups), columns of sum 1.

    A group's noise has the indices patterns * group .. in the order of the patterns. Groups come last, as sums over
    rows of six numbers are slow.
    """
    groups = torch.arange(first, first + len(score), device=score.device).mul_(len(patterns))
    noise = _gumbel(noise_key(curve.key, gate), groups + torch.arange(len(patterns), device=score.device)[:, None])
    return noise.addmm_(patterns, score.T, alpha=curve.choice).div_(curve.tau).softmax(0)


def chosen_masks(chosen: Tensor, patterns: Tensor) -> Tensor:
    """M of groups by their y, flat."""
    return (patterns.T @ chosen).T.reshape(-1)


def choice_gradient(chosen: Tensor, product: Tensor, patterns: Tensor, curve: Curve) -> Tensor:
    """dL/dP of groups, flat, by y and the product G W of gradients and weights, (groups, m)."""
    value = patterns @ product.T
    value -= (chosen * value).sum(0)
    return (patterns.T @ value.mul_(chosen)).mul_(curve.choice / curve.tau).T.reshape(-1)
