"""Small odd flat partitions for the tests of the ops: uneven runs, gaps, an empty fragment, patches cut anywhere."""

from typing import Any

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.parts import patch_table
from leap_dist.ops.reference import Adam, run_table
from leap_dist.ops.slices import Slice
from leap_dist.ops.soft import Curve, logistic, noise_key

NUMEL, NUM_GATES = 3001, 4
RUNS = [(5, 0, 0, 1), (5, 1500, 0, 1), (1600, 1, 1, 0), (1700, 1025, 3, 0)]  # gate 2 has none here
NUMBERED = [(offset, length, gate, 100_000 * gate + offset) for offset, length, gate, _ in RUNS]
ADAM = Adam(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3)
SCORE_ADAM = ADAM._replace(lr=3e-2, weight_decay=0.0)
SLICES = {
    "row": Slice("t", 37, 29, 1, 29),
    "column": Slice("t", 37, 29, 37, 1),
    "block": Slice("t", 37, 29, 8, 8),
    "small block": Slice("t", 37, 29, 4, 5),
    "head": Slice("t", 37, 29, 9, 29, region=(3, 30, 0, 29)),
    "columns of a region": Slice("t", 37, 29, 37, 1, region=(0, 37, 5, 11)),
    "wide": Slice("t", 3, 400, 3, 390),
}


def table(size: int = 700) -> Tensor:
    """The runs, cut to rows of at most `size`."""
    return run_table(RUNS, size)


def covered() -> Tensor:
    """True for the elements of some run."""
    inside = torch.zeros(NUMEL, dtype=torch.bool)
    for offset, length, *_ in RUNS:
        inside[offset : offset + length] = True
    return inside


def state(seed: int, moments: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of element_adamw_ besides the table and the scalars."""
    torch.manual_seed(seed)
    latent, grad, score = (torch.randn(NUMEL) for _ in range(3))
    mask, others = torch.rand(NUMEL) < 0.4, torch.rand(NUMEL) < 0.7
    means = [torch.randn(NUMEL).to(moments) for _ in range(2)]
    squares = [torch.rand(NUMEL).add_(0.01).to(moments) for _ in range(2)]
    return {
        "grad": grad,
        "hosted": latent * mask,
        "mask": mask,
        "others": others,
        "latent": latent,
        "exp_avg": means[0],
        "exp_avg_sq": squares[0],
        "score": score,
        "score_exp_avg": means[1],
        "score_exp_avg_sq": squares[1],
    }


def expected(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """In float64: what element_adamw_ leaves in its state, and dL/dsigma of every gate."""
    exact = {k: v.double() for k, v in arguments.items() if v is not None}
    inside, (decays, sigma) = covered(), _by_run(exact)
    others = exact.get("others", torch.ones(NUMEL, dtype=torch.float64))
    score_grad, weight_grad = exact["grad"] * exact["latent"] * others, exact["grad"] * exact["mask"]
    weights = _adamw(exact["latent"], weight_grad, exact["exp_avg"], exact["exp_avg_sq"], ADAM, decays)
    scores = _adamw(
        exact["score"], score_grad, exact["score_exp_avg"], exact["score_exp_avg_sq"], SCORE_ADAM, 0.0 * decays
    )
    names = "latent", "exp_avg", "exp_avg_sq", "score", "score_exp_avg", "score_exp_avg_sq"
    return {k: torch.where(inside, v, exact[k]) for k, v in zip(names, (*weights, *scores), strict=True)}, sigma


def expected_of_soft(
    arguments: dict[str, Any], curve: Curve, pulls: Tensor, adam: Adam
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """In float64: the soft masks, NaN outside of the runs, and what learn_soft_ leaves in scores and their moments."""
    exact = {k: arguments[k].double() for k in ("grad", "latent", "score", "score_exp_avg", "score_exp_avg_sq")}
    mask, gradient = torch.full((NUMEL,), float("nan"), dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for offset, length, gate, first in NUMBERED:
        b = slice(offset, offset + length)
        noise = logistic(noise_key(curve.key, gate), first, length, torch.device("cpu")).double()
        mask[b] = m = torch.sigmoid((curve.alpha * exact["score"][b] + curve.bias + noise) / curve.tau)
        constant, of_square = pulls[gate].double()
        towards = exact["grad"][b] * exact["latent"][b] + constant + of_square * exact["latent"][b] ** 2 * m
        gradient[b] = towards * m * (1.0 - m) * curve.alpha / curve.tau
    moments = exact["score_exp_avg"], exact["score_exp_avg_sq"]
    moved = _adamw(exact["score"], gradient, *moments, adam, torch.zeros(NUMEL, dtype=torch.float64))
    before = exact["score"], *moments
    return mask, tuple(torch.where(mask.isnan(), old, new) for old, new in zip(before, moved, strict=True))


def shared(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of shared_adamw_: scores have no moments."""
    return {key: value for key, value in arguments.items() if key not in ("score_exp_avg", "score_exp_avg_sq")}


def expected_of_shared(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """In float64: what shared_adamw_ leaves in its state, and dL/dsigma of every gate."""
    exact = {k: v.double() for k, v in arguments.items() if v is not None}
    inside, (decays, sigma) = covered(), _by_run(exact)
    others = exact.get("others", torch.ones(NUMEL, dtype=torch.float64))
    w, m, v, g = (exact[key] for key in ("latent", "exp_avg", "exp_avg_sq", "grad"))
    m, v = ADAM.beta1 * m + (1 - ADAM.beta1) * g, ADAM.beta2 * v + (1 - ADAM.beta2) * g * g
    first, root = m / (1 - ADAM.beta1**ADAM.step), (v / (1 - ADAM.beta2**ADAM.step)).sqrt()
    score = exact["score"] - SCORE_ADAM.lr * others * w * first / (w.abs() * root + ADAM.eps)
    w = w * (1 - ADAM.lr * ADAM.weight_decay * decays) - ADAM.lr * exact["mask"] * first / (root + ADAM.eps)
    made = {"latent": w, "exp_avg": m, "exp_avg_sq": v, "score": score}
    return {key: torch.where(inside, value, exact[key]) for key, value in made.items()}, sigma


def _by_run(exact: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Whether elements decay, and dL/dsigma of every gate."""
    decays, sigma = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUM_GATES, dtype=torch.float64)
    for offset, length, gate, decay in RUNS:
        run = slice(offset, offset + length)
        decays[run] = decay
        sigma[gate] += (exact["grad"][run] * exact["hosted"][run]).sum()
    return decays, sigma


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, adam: Adam, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = w * (1 - adam.lr * adam.weight_decay * decays)
    m, v = adam.beta1 * m + (1 - adam.beta1) * g, adam.beta2 * v + (1 - adam.beta2) * g * g
    root = (v / (1 - adam.beta2**adam.step)).sqrt() + adam.eps
    return w - adam.lr * m / (1 - adam.beta1**adam.step) / root, m, v


def groups() -> tuple[Tensor, Tensor, Tensor]:
    """(table, scores, kept) of best_of_: groups of 4, 3 and 40, one gate of which keeps nothing; scores with ties."""
    gates = [(5, 8, 0, 4), (5, 0, 0, 4), (20, 1200, 0, 4), (1301, 9, 1, 3), (1400, 1040, 3, 40), (2600, 4, 2, 4)]
    cut = [run_table([run], 400 // run[3] * run[3]) for run in gates]
    scores = torch.randint(-3, 3, (NUMEL,)).float()
    scores[:100:3] = -0.0
    return torch.cat(cut), scores, torch.tensor([2, 1, 0, 13])


def patches(kind: str) -> Tensor:
    """A tensor under one slice in four uneven fragments, one of them empty; units begin at number 3."""
    part, flat = SLICES[kind], torch.empty(0)
    numel = part.rows * part.cols
    cuts = [(0, 100, 7), (100, 0, 0), (100, 1, 300), (101, numel - 101, 400)]
    fragments = [Fragment("t", start, length, flat, offset) for start, length, offset in cuts if length]
    return patch_table([(fragment, part, 3) for fragment in fragments])


def num_units(kind: str) -> int:
    """Length of the joint vector: three units of another gate before, one after."""
    return 3 + SLICES[kind].units.stop + 1


def unit_of(kind: str) -> Tensor:
    """The unit of every element of the flat buffer (2000,), -1 outside."""
    part = SLICES[kind]
    top, num_rows, left, num_cols = part.bounds
    grid = torch.full((part.rows, part.cols), -1)
    for row in range(num_rows):
        for col in range(num_cols):
            place = row // part.block_rows * part.grid[1] + col // part.block_cols
            grid[top + row, left + col] = 3 + place
    units, flat = grid.flatten(), torch.full((2000,), -1)
    flat[7:107], flat[300], flat[400 : 400 + len(units) - 101] = units[:100], units[100], units[101:]
    return flat
