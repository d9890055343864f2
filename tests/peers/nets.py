"""Small models and data for equivalence tests, with awkward sizes on purpose."""

from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.config.family import FamilyConfig
from leap_dist.config.job_file import parse_leap, parse_section
from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import GatePlan
from leap_dist.models.plan import make_plan

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
# The same on `Mixer`, whose units cover runs of several tensors, or are not free.
TWO_OF_FOUR = {"granularity": "2:4", "include": r"re:blocks\.\d\.(qkv|out|up|gate)\.weight"}  # rows of 12
UNIFORM = {"granularity": "neuron", "uniform": True, "multiple_of": 3, "min_keep": 2}
MIXED: dict[str, dict[str, Any]] = {
    "head+neuron": {"gates": ["head", "neuron"], "target": 0.45},
    "uniform": {"gates": [UNIFORM]},
    "layer+element": {"gates": ["layer", "element"]},
    "2:4": {"gates": [TWO_OF_FOUR], "target": 0.5},
    "head+2:4": {"gates": ["head", TWO_OF_FOUR], "target": 0.35},
}
GATES |= MIXED
FAMILY = {
    "layers": "re:blocks\\.\\d+",
    "attention": {"module": "", "qkv": "qkv", "output": "out", "head_size": "head_size"},
    "ffn": {"up": "up", "gate": "gate", "down": "down"},
}


class Block(nn.Module):
    """Attention with three heads of four and a gated FFN of eleven neurons, (batch, 3, 12) to the same.

    No softmax: the gradient of the keys' bias would be nothing but rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head_size = 4
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.gate, self.down = nn.Linear(12, 11), nn.Linear(12, 11), nn.Linear(11, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        attended = torch.tanh(query @ key.mT / 2.0) @ value
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Mixer(nn.Module):
    """13 -> 3 tokens of 12 -> two blocks -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.answer = nn.Linear(13, 36), nn.Linear(36, 5)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 13) -> (batch, 5)."""
        return self.answer(self.blocks(self.embed(x).unflatten(-1, (3, 12))).flatten(1))


def family(kind: str) -> dict[str, Any] | None:
    """The family section for one of GATES."""
    return FAMILY if kind in MIXED else None


def net(kind: str = "element") -> nn.Module:
    """The model for one of GATES: a Mixer, or 13 -> 37 -> 29 -> 2 -> 1 -> 5.

    Sizes that no number of ranks divides, a norm that no gate covers.
    The norm comes first: behind a gated matrix it would make the loss independent of that matrix's scale, or, once
    one row is left, of the row, and their gradients nothing but rounding.
    """
    torch.manual_seed(0)
    if kind in MIXED:
        return Mixer()
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
    """The leap section for one of GATES; scores start by magnitude where they start and `changes` do not say."""
    start = {} if changes.get("rule") == "magnitude" else {"score_init": "magnitude"}
    return parse_leap({"target": 0.2, "total_steps": steps, **start, **GATES[kind], **changes})


def plan_of(kind: str, model: nn.Module, config: LeapConfig) -> GatePlan:
    """The gates of `net(kind)`."""
    section = family(kind)
    return make_plan(model, config, parse_section(FamilyConfig, "family", section) if section else None)


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
