"""Inputs: how large each input feature of the gated matrices is, ||x_j|| over the tokens of the dense phase.

Scores that start at |W_ij| ||x_j|| (Sun et al., arXiv 2306.11695) know which weights meet large inputs. Forward
passes of a rank are counted as they come (`see`); after every step they are summed over the ranks (`pool`), so that a
checkpoint between two steps holds them all. Sums are fp64: in which order and on how many ranks they are made does not
show in an fp32 norm.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.errors import UserError, few_of
from leap_dist.ops.slices import Slice

logger = logging.getLogger(__name__)

FAINT = 1e-6
"""What the inputs of experts without tokens count beside those of others: enough to rank weights of one row by size."""
INPUTS = "leap.inputs"  # the name of the sums in checkpoints


@dataclass(frozen=True)
class Axes:
    """Where a matrix has its inputs and its outputs: slices that cut it into one unit for each of them.

    matrices: in the tensor, one below the other: those of fused experts, each with inputs and outputs of its own.
    """

    inputs: Slice
    outputs: Slice
    matrices: int = 1

    @property
    def num_inputs(self) -> int:
        """Input features, of all its matrices."""
        return self.inputs.units.stop

    @property
    def inputs_each(self) -> int:
        """Input features of one of its matrices."""
        return self.num_inputs // self.matrices


def num_features(axes: Mapping[str, Axes]) -> int:
    """Input features of all matrices together."""
    return sum(own.num_inputs for own in axes.values())


class Inputs:
    """Sums of squares of the inputs of matrices, over tokens and ranks.

    axes: by tensor, in name order on every rank. A rank keeps the share of the features that `fragments` says, fp64 in
    `flat`; `everyone` are the ranks that see data, `sharing` those that share the state (one under stage 0).
    `listen` is called with whether forward passes are to be reported from now on; `calibrating`: also those in
    evaluation mode.
    """

    def __init__(
        self,
        axes: Mapping[str, Axes],
        sharing: Communicator,
        everyone: Communicator,
        device: torch.device,
        strict: bool = True,
    ) -> None:
        self.axes = dict(sorted(axes.items()))
        self.sharing, self.everyone, self._strict = sharing, everyone, strict
        size = num_features(self.axes)
        share = -(-size // sharing.world_size)
        start = min(sharing.rank * share, size)
        self.flat = torch.zeros(min(share, size - start), dtype=torch.float64, device=device)
        self.fragments = [Fragment(INPUTS, start, len(self.flat), self.flat, 0)] if len(self.flat) else []
        self._start, self._size = start, size
        self._seen: dict[str, Tensor] = {}
        self.listen: Callable[[bool], None] = lambda on: None
        self.calibrating = False
        self.idle: dict[str, Tensor] = {}

    def see(self, tensor: str, rows: Tensor, first: int = 0) -> None:
        """Count inputs of one forward pass, (..., features), from feature `first` of the tensor on."""
        squares = rows.detach().reshape(-1, rows.shape[-1]).float().square()
        self.add(tensor, squares.sum(0, dtype=torch.float64), first)

    def add(self, tensor: str, sums: Tensor, first: int = 0) -> None:
        """Count sums of squares, fp64 (features,), from feature `first` on. Those that are not finite count for
        nothing: such a step is left out."""
        if tensor not in self._seen:
            self._seen[tensor] = sums.new_zeros(self.axes[tensor].num_inputs)
        self._seen[tensor][first : first + len(sums)] += torch.where(torch.isfinite(sums).all(), sums, 0.0)

    def pool(self) -> None:
        """Add what all ranks have seen since the last call. Collective."""
        device = self.flat.device
        parts = [
            self._seen[name].to(device) if name in self._seen else self.flat.new_zeros(own.num_inputs)
            for name, own in self.axes.items()
        ]
        self._seen.clear()
        self.flat += self.everyone.sum_(torch.cat(parts))[self._start : self._start + len(self.flat)]

    def norms(self) -> dict[str, Tensor]:
        """||x_j|| of the inputs of every matrix, fp32 of shape (features,). Collective.

        Experts that no token reached, whose features `idle` then has, have FAINT of the others' mean: single weights
        are compared with their row, whole units with others that are worth more. They are reported. Raises UserError,
        on every rank, for a tensor through which nothing went; if not `strict`, only where that is so for all: the
        others' weights are as those of such experts.
        """
        sums = self.flat.new_zeros(self._size)
        sums[self._start : self._start + len(self.flat)] = self.flat
        sizes = [own.num_inputs for own in self.axes.values()]
        found = self.sharing.sum_(sums).sqrt().float().split(sizes)
        norms = dict(zip(self.axes, found, strict=True))
        unseen = [name for name, norm in norms.items() if not norm.any()]
        if unseen and (self._strict or len(unseen) == len(norms)):
            raise UserError(_nothing_seen(unseen, len(norms)))
        self.idle = {name: idle for name, norm in norms.items() if (idle := self._fill_idle_(name, norm)).any()}
        if self.idle and self.everyone.rank == 0:
            self._report_idle(unseen)
        return norms

    def _fill_idle_(self, tensor: str, norms: Tensor) -> Tensor:
        """Give matrices without inputs a little of the root mean square of the others'; which features those are."""
        each = norms.view(-1, self.axes[tensor].inputs_each)
        idle = ~each.any(1)
        each[idle] = FAINT * (1.0 if idle.all() else each[~idle].square().mean(0).sqrt())
        return idle.repeat_interleave(each.shape[1])

    def _report_idle(self, unseen: list[str]) -> None:
        if unseen:
            logger.warning(
                "leap.score_init: no forward pass in training mode has shown the inputs of %s: their scores start by "
                "|W|; leave out in leap.exclude what is not used",
                few_of(unseen),
            )
        idle = {name: own for name, own in self.idle.items() if name not in unseen}
        if not idle:
            return
        logger.warning(
            "leap.score_init: no token reached %d of %d experts' matrices: whole units of them are the first to leave, "
            "single weights start by the mean of the others' inputs. A longer dense phase, or more "
            "leap.calibration_batches, reach more",
            sum(int(own.sum()) // self.axes[name].inputs_each for name, own in idle.items()),
            sum(own.matrices for own in self.axes.values() if own.matrices > 1),
        )


def _nothing_seen(names: list[str], of: int) -> str:
    what = "the inputs of any weight" if len(names) == of else f"the inputs of {few_of(names)}"
    return (
        f"leap.score_init: scores start by inputs, but no forward pass in training mode has shown {what}; call "
        "engine.train() before the first step, or leap_dist.calibrate(engine, batches), leave out in leap.exclude what "
        'no batch reaches, or set it to "magnitude"'
    )
