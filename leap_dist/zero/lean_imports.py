"""Keeps DeepSpeed from importing what nothing here uses: seconds of every rank's start, and memory.

Whoever else wants it, in another thread at the same time too, gets it.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FrameType, ModuleType
from typing import Any

AUTOTUNER = "deepspeed.autotuning.autotuner"
MUON = "deepspeed.runtime.zero.muon.original_muon"


class LeanImports(MetaPathFinder):
    """Hides MLflow from DeepSpeed's autotuner (2.5 s), and compiles DeepSpeed's Muon when it is called.

    DeepSpeed imports its autotuner, and that MLflow if it can. It imports Muon with every ZeRO engine, to see whether
    that is the engine's optimizer; its `torch.compile` at import loads the whole of inductor, 4 s and 186 MB.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "mlflow" and _importer() == AUTOTUNER:
            raise ModuleNotFoundError("hidden from DeepSpeed's autotuner", name="mlflow")
        if name != MUON:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _CompiledWhenCalled(name, spec.origin)
        return spec


def _importer() -> str | None:
    """The module whose import statement is being run."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_globals["__name__"]:
        frame = frame.f_back
    return frame and frame.f_globals["__name__"]


class _CompiledWhenCalled(SourceFileLoader):
    """Runs a module whose functions are decorated with `@deepspeed.runtime.compiler.compile()`."""

    def exec_module(self, module: ModuleType) -> None:
        from deepspeed.runtime import compiler

        at_once, compiler.compile = compiler.compile, lambda: _when_called
        try:
            super().exec_module(module)
        finally:
            compiler.compile = at_once


def _when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, made at the first call."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
