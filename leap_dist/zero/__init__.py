"""The one place that touches DeepSpeed."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import FrameType, ModuleType


class _AutotunerWithoutMlflow(MetaPathFinder):
    """Keeps `import deepspeed` from importing MLflow, which takes every rank another 2.5 s of its start.

    DeepSpeed imports its autotuner, and that MLflow if it can. Nothing of it is used here. Whoever else imports
    MLflow, in another thread at the same time too, gets it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "mlflow":
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_globals["__name__"]:
                frame = frame.f_back
            if frame is not None and frame.f_globals["__name__"] == "deepspeed.autotuning.autotuner":
                raise ModuleNotFoundError("hidden from DeepSpeed's autotuner", name="mlflow")


sys.meta_path.insert(0, _AutotunerWithoutMlflow())
