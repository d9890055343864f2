"""The one place that touches DeepSpeed."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class _AutotunerWithoutMlflow(MetaPathFinder):
    """Keeps `import deepspeed` from importing MLflow, which takes every rank another 2.5 s of its start.

    DeepSpeed imports its autotuner, and that MLflow if it can. Nothing of it is used here, and where MLflow is
    imported by anyone else, it is.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "mlflow":
            autotuner = sys.modules.get("deepspeed.autotuning.autotuner")
            if autotuner is not None and not hasattr(autotuner, "Autotuner"):  # it is being imported
                raise ModuleNotFoundError("hidden from DeepSpeed's autotuner", name="mlflow")


sys.meta_path.insert(0, _AutotunerWithoutMlflow())
