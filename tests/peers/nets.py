"""Small models and data for equivalence tests, with awkward sizes on purpose."""

from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.config import LeapConfig
from leap_dist.job_file import parse_leap

GLOBAL_BATCH = 18  # divides by 1, 2 and 3 ranks, with accumulation 1 and 3
LR, WEIGHT_DECAY = 3e-3, 0.1

SMALL = ["5.weight", "7.weight"]  # 2 x 29, and 1 x 2: fewer elements than three ranks

# Granularities with what they leave out.
GATES: dict[str, dict[str, Any]] = {
    "element": {"gates": ["element"]},
    "row": {"gates": ["row"]},
    "column": {"gates": ["column"]},
    "block": {"gates": ["block:4x5"], "exclude": SMALL},
    "hybrid": {"gates": ["block:8x8", "row", "element"], "exclude": SMALL},
}


def net() -> nn.Sequential:
    """13 -> 37 -> 29 -> 2 -> 1 -> 5: sizes that no number of ranks divides, a norm that no gate covers.

    The norm comes first: behind a gated matrix it would make the loss independent of that matrix's scale, or, once
    one row is left, of the row, and their gradients nothing but rounding.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(13),
        nn.Linear(13, 37),
        nn.Tanh(),
        nn.Linear(37, 29),
        nn.Tanh(),
        nn.Linear(29, 2),
        nn.Tanh(),
        nn.Linear(2, 1),
        nn.Tanh(),
        nn.Linear(1, 5),
    )


def leap(kind: str, steps: int, **changes: Any) -> LeapConfig:
    """The leap section for one of GATES."""
    return parse_leap({"target": 0.2, "total_steps": steps, **GATES[kind], **changes})


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of every step, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(13, 5, generator=generator)
    inputs = [torch.randn(GLOBAL_BATCH, 13, generator=generator) for _ in range(steps)]
    return [(x, torch.tanh(x @ teacher)) for x in inputs]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return ((output.float() - target) ** 2).mean()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()
