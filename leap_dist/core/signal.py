"""Which thresholds the loss says nothing of: those of weights whose scale a norm takes away again.

dL/dsigma is the sum of G * W * M over what a gate covers (G = dL/d(W * M)), which is how the loss changes with the
scale of W * M. Where a norm follows a matrix, as q_norm and k_norm in Qwen3 and all but one matrix of a Gemma 3 layer,
the loss does not depend on that scale: the sum is 0 whatever is pruned, and what is computed is rounding, which Adam
would make as large a step of as of any gradient. Such thresholds are held: they follow the level, together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import Gating

STEPS = 16  # in which it is found out
FLOOR = 0.1  # of the root of the sum of squares, which sums of weights of either sign come to
CHUNK = 2**22  # weights at a time


class Signal:
    """Watches dL/dsigma in the first STEPS steps, beside the root of the sum of (G W M)^2 over the same weights.

    A gate is held where the root mean square of the first is below FLOOR times that of the second. Gemma 3 270M in
    bf16, 512 tokens a step: at most 0.1 in one step where a norm follows, mostly below 0.01; 0.5 to 6 elsewhere.
    """

    def __init__(self, plan: GatePlan) -> None:
        self._plan = plan
        self.num_steps = 0
        self._sums = torch.zeros(2, len(plan.gates), dtype=torch.float64)  # of squares: of the sum, of what is summed

    @property
    def is_known(self) -> bool:
        """Whether all steps have been seen."""
        return self.num_steps >= STEPS

    @property
    def held(self) -> Tensor:
        """The gates that are held by what has been seen, bool of shape (G,)."""
        return self._sums[0] < FLOOR**2 * self._sums[1]

    def heard(self, grad: Tensor) -> Tensor:
        """dL/dsigma, (G,), without what is rounding alone."""
        return grad.masked_fill(self.held, 0.0)

    def watch(self, gating: Gating, grad: Tensor) -> None:
        """Take in a step, before W * M is written anew. grad: dL/dsigma, (G,). Collective."""
        squares = torch.zeros(len(self._plan.gates), dtype=torch.float64, device=gating.device)
        for tensor, products in self._products(gating):
            for cover in self._plan.covers[tensor]:
                squares[cover.gate] += products.double().square().sum()
        self.add(grad, gating.communicator.sum_(squares).cpu())

    def add(self, grad: Tensor, squares: Tensor) -> None:
        """Count a step. grad: dL/dsigma; squares: the sum of (G W M)^2 of each gate; both (G,)."""
        self._sums += torch.stack([grad.double().square(), squares])
        self.num_steps += 1

    def _products(self, gating: Gating) -> Iterator[tuple[str, Tensor]]:
        """G W M of this rank's fragments of gated tensors, in chunks."""
        for fragment in gating.weights:
            if (grad := fragment.flat.grad) is not None:
                pairs = zip(fragment.view(grad).split(CHUNK), fragment.view(fragment.flat).split(CHUNK), strict=True)
                for part, hosted in pairs:
                    yield fragment.tensor, part * hosted.detach()

    def plain_state(self) -> dict[str, list[float]]:
        """For a checkpoint, JSON-able."""
        sums, squares = self._sums.tolist()
        return {"steps": [float(self.num_steps)], "sums": sums, "squares": squares}

    def load_plain_state(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Continue from `plain_state()`; a run of an older version has none, and holds none."""
        none = [0.0] * len(self._plan.gates)
        self.num_steps = int(saved.get("steps", [STEPS])[0])
        self._sums = torch.tensor([saved.get(key, none) for key in ("sums", "squares")], dtype=torch.float64)
