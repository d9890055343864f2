"""leap_dist: pruning with learned thresholds inside DeepSpeed's sharded optimizer step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leap_dist.zero.engine import finalize, initialize

__all__ = ["finalize", "initialize"]


def __getattr__(name: str) -> Any:
    """Import DeepSpeed only when a name that needs it is used."""
    if name in __all__:
        return getattr(import_module("leap_dist.zero.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
