"""The gates' own values: thresholds and scores of structured units, in fp32, with Adam's moments.

They stand beside the model, not in it, so that its modules, its names and its files stay what they were: LeapAdamW
shards them over the ranks, steps them, and carries them in its state_dict.
"""

import torch

from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import GatePlan

THRESHOLDS, SCORES = "leap.thresholds", "leap.scores"  # the names of the two tensors in checkpoints


def gate_sizes(plan: GatePlan) -> dict[str, int]:
    """The number of elements of each tensor of gate values, by name."""
    sizes = {THRESHOLDS: len(plan.gates), SCORES: plan.num_structured_units}
    return {name: size for name, size in sizes.items() if size}


class GateValues:
    """This rank's share: of each tensor elements [r * s, (r + 1) * s) with s = ceil(size / ranks), as far as there are.

    flat: the values, fp32, (length,), `fragments` says of what; keys name moments of the same shape in `state`.
    """

    def __init__(self, plan: GatePlan, communicator: Communicator, device: torch.device, keys: tuple[str, ...]) -> None:
        runs, offset = [], 0
        for name, size in gate_sizes(plan).items():
            share = -(-size // communicator.world_size)
            start = min(communicator.rank * share, size)
            length = min(share, size - start)
            runs.append((name, start, length, offset))
            offset += length
        self.flat = torch.zeros(offset, device=device)
        self.state = {key: torch.zeros_like(self.flat) for key in keys}
        self.fragments = [Fragment(name, start, length, self.flat, place) for name, start, length, place in runs]
