"""ONNX: any batch and any length, checked with onnxruntime against torch before it is handed out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from leap_dist.errors import UserError
from leap_dist.export.latency import Runner, logits_of, torch_runner
from leap_dist.export.shrunk import Say, silent
from leap_dist.models.flops import plain_implementations
from leap_dist.models.outputs import example_inputs, relative_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "model.onnx"
TOLERANCE = 1e-4  # relative to the largest logit
WRITING, MOST = 6e11, 2e5  # tokens x parameters that a model computes while its file is written; tokens at most
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
MAKE_DECODER_INPUTS = ("Classification", "ForQuestionAnswering")
"""How the names of classes end that shift input_ids by themselves, where they have an encoder and a decoder."""


def missing_libraries() -> list[str]:
    """Which of the optional libraries are not installed."""
    return [name for name in LIBRARIES if find_spec(name) is None]


def require_libraries(what: str) -> None:
    """UserError if the optional libraries are not installed; `what` is the flag that asks for them."""
    if missing := missing_libraries():
        raise UserError(f'{what}: {", ".join(missing)} not installed; install with pip install -e ".[onnx]"')


class _Logits(nn.Module):
    """A model as a function of its inputs alone, in their order."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True))))


def work_of(model: PreTrainedModel, longest: int) -> tuple[float, float]:
    """About as many tokens as go through the model while its file is written, and while that is compared with it."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return min(WRITING / parameters, MOST), 2.0 * sum(batch * length for batch, length in _compared_sizes(longest))


def save_onnx(model: PreTrainedModel, path: Path, longest: int, say: Say = silent) -> float:
    """Write `model` to `path`; returns the largest difference of logits between onnxruntime and torch, relative.

    Inputs are the model's own (input_ids, attention_mask, ...), int64 (batch, length), the output is "logits", of
    a model without a head "last_hidden_state". Weights beyond ONNX's limit of 2 GB a file go beside it. RuntimeError
    if onnxruntime computes something else.
    """
    writing, comparing = work_of(model, longest)
    say("writing the ONNX file", writing)
    inputs = model_inputs(model, 2, min(longest, 7))
    names = tuple(inputs)
    attention: str = model.config._attn_implementation
    shapes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # experts: the loop over those that were hit depends on data, which a graph cannot hold; "batched_mm" does not
    with _quiet(), plain_implementations(model, attention, "batched_mm"), torch.no_grad():
        program = torch.onnx.export(
            _Logits(model, names).eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=names,
            output_names=["last_hidden_state" if model.base_model is model else "logits"],
            dynamic_shapes=((shapes,) * len(names),),
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces: paths of this machine, as large as a small model
        program.save(path)
    say("comparing onnxruntime with torch", comparing)
    found = onnx_difference(model, path, longest)
    if not found <= TOLERANCE:
        raise RuntimeError(
            f"{path.name}: the logits of onnxruntime differ from torch's by {found:.3g} of the largest, "
            f"allowed {TOLERANCE:g}; it was not exported"
        )
    return found


def model_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs, the last tokens of the first row masked as padding; sentence pairs have their token types.

    No decoder_input_ids for classes that make them of input_ids, as none are in the batches of their tasks.
    """
    inputs = example_inputs(model, batch, length)
    if type(model).__name__.endswith(MAKE_DECODER_INPUTS):
        inputs.pop("decoder_input_ids", None)
    ids = inputs["input_ids"]
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs.setdefault("token_type_ids", torch.zeros_like(ids))
    if length > 2:
        inputs["attention_mask"][0, -(length // 3) :] = 0
    return inputs


def _compared_sizes(longest: int) -> tuple[tuple[int, int], ...]:
    """(batch, length) of the inputs on which onnxruntime and torch are compared."""
    return (1, 1), (1, longest), (3, (longest + 1) // 2), (5, 2)


def onnx_difference(model: PreTrainedModel, path: Path, longest: int) -> float:
    """Largest difference of logits relative to the largest logit, over several batches and lengths."""
    torch_run, onnx_run = torch_runner(model), onnx_runner(path, threads=1)
    values = []
    for batch, length in _compared_sizes(longest):
        inputs = model_inputs(model, batch, length)
        expected, found = torch_run(inputs), onnx_run(inputs)
        if found.ndim == 3:  # an answer for each token; padding may lie where its sliding window sees nothing
            real = inputs["attention_mask"] > 0
            expected, found = expected[real], found[real]
        values.append(relative_difference(expected, found))
    return float(np.max(values))  # max() would lose NaN


def onnx_runner(path: Path, threads: int) -> Runner:
    """Runs a file with onnxruntime on `threads` threads of the CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls: it would slow torch beside it
    options.log_severity_level = 3  # errors
    session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the exporter about its own internals, or about operators of libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
