"""Fewer bits after pruning: the shrunk model with weights in 8 bits, for onnxruntime, and for torch by torchao."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from leap_dist.errors import UserError
from leap_dist.export import onnx
from leap_dist.export.shrunk import Say, silent
from leap_dist.models.load import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_torchao(what: str) -> None:
    """UserError if torchao is not installed; `what` is the flag that asks for it."""
    if find_spec("torchao") is None:
        raise UserError(f'{what}: torchao not installed; install with pip install -e ".[int8]"')


def work_of(model: PreTrainedModel, longest: int) -> tuple[float, float, float]:
    """As onnx.work_of, and between the two the work of quantising; all is compared twice."""
    writing, comparing = onnx.work_of(model, longest)
    return writing, writing / 3, 2 * comparing


def save_int8_onnx(model: PreTrainedModel, path: Path, longest: int, say: Say = silent) -> float:
    """Write `model` for onnxruntime: weights and embeddings in 8 bits, a scale for each output of a matrix.

    What meets them is brought to 8 bits while it runs ("dynamic"). Returns by how much its logits differ from torch's,
    relative to the largest. RuntimeError if they are no numbers.
    """
    quantization: Any = import_module("onnxruntime.quantization")
    options = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    options["reduce_range"] = True  # weights of -64 .. 64: sums of larger ones overflow on processors without VNNI
    with TemporaryDirectory(dir=path.parent) as scratch, _quiet():
        whole = Path(scratch, onnx.FILE)
        onnx.save_onnx(model, whole, longest, say)
        _, quantising, comparing = work_of(model, longest)
        say("quantising the ONNX file", quantising)
        large = sum(value.numel() for value in model.parameters()) > 2**31  # one file of ONNX holds 2 GB
        quantization.quantize_dynamic(whole, path, use_external_data_format=large, **options)
    say("comparing onnxruntime in 8 bits with torch", comparing / 2)
    found = onnx.onnx_difference(model, path, longest)
    if not found < float("inf"):
        raise RuntimeError(f"{path.name}: onnxruntime gives no numbers in 8 bits; it was not exported")
    return found


def save_int8_torch(folder: Path) -> PreTrainedModel:
    """Bring the linear layers of the stock model in a folder to 8 bits there, all but the head; returns the model.

    Its embeddings and its head stay as they are. transformers loads it where torchao is installed.
    """
    import transformers

    torchao: Any = import_module("torchao.quantization")
    with quiet_transformers(), _quiet():
        name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        kind = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
        options = {"dtype": torch.float32, "quantization_config": kind}
        model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder, **options)
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        model.save_pretrained(folder)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice of the quantisers on what is done here already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
