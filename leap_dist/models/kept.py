"""What a pruned model computes beyond its zeros: routers choose among kept experts, norms are over kept dimensions."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.utils.hooks import RemovableHandle

from leap_dist.config.family import FamilyConfig
from leap_dist.models.norms import norm_among_kept
from leap_dist.models.routing import route_among_kept


def compute_among_kept(
    model: nn.Module,
    granularities: Collection[str],
    masked: Collection[str],
    family: FamilyConfig | None = None,
    to_prune: bool = False,
) -> list[RemovableHandle]:
    """Hook what gates of these granularities, and masks of these tensors, need; the handles' `remove` undoes it.

    to_prune: whether experts may leave later. Raises UserError for routers that do not allow it.
    """
    handles = route_among_kept(model, family, to_prune) if "expert" in granularities else []
    return handles + norm_among_kept(model, masked)
