"""llama.cpp on this machine, by llama-cpp-python, where that is installed: how fast a GGUF file is, and how good."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leap_dist.export.latency import Runner

NOT_HERE = "Latency and metrics in llama.cpp are not measured: llama-cpp-python is not installed."


def is_here() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def llama_runner(path: Path, threads: int, longest: int, every: bool = False) -> Runner:
    """Runs a file on texts of at most `longest` tokens, one after another; padding is left out of them.

    Gives the logits of the last token, (batch, 1, vocabulary); `every`: of all tokens, of texts of one length.
    """
    llama = import_module("llama_cpp")
    options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": longest, "n_ubatch": longest}
    engine = llama.Llama(str(path), n_ctx=longest, logits_all=every, verbose=False, **options)
    width = engine.n_vocab()

    def one(ids: list[int]) -> Tensor:
        engine.reset()
        engine.eval(ids)
        if every:
            return torch.from_numpy(engine.scores[: len(ids)].copy())
        last = llama.llama_get_logits_ith(engine.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(last, shape=(width,)).copy())[None]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        return torch.stack([one(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)])

    return run
