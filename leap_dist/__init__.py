"""leap_dist: pruning with learned thresholds inside DeepSpeed's sharded optimizer step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leap_dist.checkpoint.checkpoints import Checkpoints
    from leap_dist.models.adapters import hold_zeros
    from leap_dist.models.pruned_folder import load_pruned, save_pruned
    from leap_dist.zero.calibration import calibrate
    from leap_dist.zero.engine import attach, finalize, host, initialize, release
    from leap_dist.zero.trainer import LeapCallback

__all__ = [
    "Checkpoints",
    "LeapCallback",
    "attach",
    "calibrate",
    "finalize",
    "hold_zeros",
    "host",
    "initialize",
    "load_pruned",
    "release",
    "save_pruned",
]

_HOMES = {
    "Checkpoints": "leap_dist.checkpoint.checkpoints",
    "LeapCallback": "leap_dist.zero.trainer",
    "attach": "leap_dist.zero.engine",
    "calibrate": "leap_dist.zero.calibration",
    "finalize": "leap_dist.zero.engine",
    "hold_zeros": "leap_dist.models.adapters",
    "host": "leap_dist.zero.engine",
    "initialize": "leap_dist.zero.engine",
    "load_pruned": "leap_dist.models.pruned_folder",
    "release": "leap_dist.zero.engine",
    "save_pruned": "leap_dist.models.pruned_folder",
}


def __getattr__(name: str) -> Any:
    """Import DeepSpeed or transformers only when a name that needs it is used."""
    if name in __all__:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
