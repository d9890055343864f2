"""llama.cpp on this machine, by llama-cpp-python, where that is installed: how fast a GGUF file is, and how good."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.export.latency import Runner

NOT_HERE = "Latency and metrics in llama.cpp are not measured: llama-cpp-python is not installed."


def is_here() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def require_library(what: str) -> None:
    """UserError if llama-cpp-python is not installed; `what` is the flag that asks for it."""
    if not is_here():
        raise UserError(
            f'{what}: llama-cpp-python not installed; install with pip install -e ".[llama]", or take gguf_q8_0'
        )


SHORTEST = 256  # tokens that an engine has room for at least; it is opened anew for a longer text


@functools.cache
def _library() -> tuple[Any, Any]:
    """llama.cpp, and what keeps it silent: a line for each tensor is no use, and what fails is seen by its answer."""
    llama = import_module("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    return llama, silent


def requantize(path: Path, kind: str, threads: int) -> None:
    """Write a GGUF file again in its place, its matrices in one of llama.cpp's own types, such as "Q4_K_M".

    RuntimeError where llama.cpp refuses it.
    """
    llama, _ = _library()
    how = llama.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    small = path.with_suffix(".small")
    failed = llama.llama_model_quantize(str(path).encode(), str(small).encode(), ctypes.byref(how))
    if failed:
        raise RuntimeError(f"llama.cpp does not write {path.name} in {kind} (code {failed}); it was not exported")
    small.replace(path)


def llama_runner(path: Path, threads: int, every: bool = False) -> Runner:
    """Runs a file on texts of any length, one after another; padding is left out of them.

    Gives the logits of the last token, (batch, 1, vocabulary); `every`: of all tokens, of texts of one length.
    """
    llama, _ = _library()

    @functools.lru_cache(maxsize=1)
    def opened(longest: int) -> Any:
        """The engine, with room for so many tokens."""
        options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": longest, "n_ubatch": longest}
        return llama.Llama(str(path), n_ctx=longest, logits_all=every, verbose=False, **options)

    room = SHORTEST

    def one(ids: list[int]) -> Tensor:
        nonlocal room
        room = max(room, 1 << (len(ids) - 1).bit_length())
        engine = opened(room)
        engine.reset()
        engine.eval(ids)
        if every:
            return torch.from_numpy(engine.scores[: len(ids)].copy())
        last = llama.llama_get_logits_ith(engine.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(last, shape=(engine.n_vocab(),)).copy())[None]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        return torch.stack([one(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)])

    return run
