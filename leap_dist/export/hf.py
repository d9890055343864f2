"""A Hugging Face folder that `AutoModel` loads in an environment without leap_dist.

The weights come tensor by tensor, as the ranks gather them, and go through transformers' own
`save_pretrained`, so that tied weights, buffers and the config are written as transformers expects them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from leap_dist.errors import UserError
from leap_dist.files import staged
from leap_dist.models.load import lacks_file, others_code, quiet_transformers, refuse_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESTORE = "restore the folder, or run the job again"
TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)
"""Files by which a tokenizer is known to be there; the model's config names its class where no other does."""


def save_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, torch.Tensor | None]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rank: int = 0,
) -> Path:
    """Write `model` with the given weights to `folder`; an older export there is replaced. Returns `folder`.

    weights: (parameter name, full tensor on rank 0, None on the others), in the same order on all ranks.
    Every rank walks it to the end (it may run collectives); rank 0 copies each tensor as it comes.
    The folder appears under its name only when it is complete.

    Raises UserError if `folder` exists and is not an exported model, RuntimeError if a name is not the model's.
    """
    if rank != 0:
        for _ in weights:
            pass
        return folder
    _refuse_foreign(folder)
    state = _state_dict(model, weights)
    dtype = next(iter(state.values())).dtype
    with staged(folder) as partial:
        with quiet_transformers():
            # names in the file are the model's own, those of the gates: no conversion to an older layout
            model.save_pretrained(partial, state_dict=state, save_original_format=False)
        _save_config(model, dtype, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def _state_dict(model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """The state dict of the unsharded model: parameters, their tied aliases, persistent buffers."""
    aliases: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    names_of = {name: names for names in aliases.values() for name in names}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        assert tensor is not None, f"rank 0 needs the tensor of {name}"
        if name not in names_of:
            raise RuntimeError(f"export: {name} is not a parameter of {type(model).__name__}")
        state.update(dict.fromkeys(names_of[name], tensor.detach().to("cpu", copy=True)))
    buffers = {name: value for name, value in model.state_dict().items() if name not in names_of}
    return state | buffers


def _save_config(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """config.json with the dtype of the file: a model trained in bf16 hands out its fp32 master weights."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: exists and holds no exported model; remove it, or choose another folder")


def load_exported(folder: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> PreTrainedModel:
    """The model in a Hugging Face folder, with the class that its config names, on the CPU, for inference."""
    with _class_and_config(folder) as (model_class, _):
        return model_class.from_pretrained(folder, dtype=dtype).eval()


def without_weights(folder: Path) -> PreTrainedModel:
    """The model in a Hugging Face folder as its config alone makes it, on the device "meta"."""
    with _class_and_config(folder) as (model_class, config), torch.device("meta"):
        return model_class(config).eval()


@contextmanager
def _class_and_config(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Of the model in a Hugging Face folder, for a block that builds it: what is wrong with it there is a UserError."""
    import transformers

    with others_code(f"{folder}: its model", RESTORE), quiet_transformers():
        refuse_kernels(folder)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        yield getattr(transformers, config.architectures[0]), config


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies beside the model."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model; None where the task needed none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    with others_code(f"{folder}: its tokenizer", lacks_file(folder) + RESTORE):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
