"""Whether two models say the same: inputs that fit any of them, and the difference of what they give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from leap_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
"""What is compared of a model's output, as far as it is there."""


def example_inputs(model: PreTrainedModel, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """Inputs that fit a model: token ids without special ones and a full mask, or an image. Always the same."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(batch, config.num_channels, height, width, generator=generator)
        return {"pixel_values": images.to(model.device, model.dtype)}
    special: set[int | None] = set()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, key, None)
        special |= set(value) if isinstance(value, list) else {value}
    words = torch.tensor([token for token in range(config.get_text_config().vocab_size) if token not in special])
    tokens = words[torch.randint(len(words), (batch, length), generator=generator)].to(model.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config.is_encoder_decoder and config.eos_token_id is not None:
        tokens[:, -1] = config.eos_token_id  # classifiers read the state of the last one
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = tokens.clone()
    return inputs


def logit_difference(masked: nn.Module, shrunk: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """max |a - b| / max |a| over the logits, or over the last hidden states of a model without a head."""
    return relative_difference(result_of(masked, inputs), result_of(shrunk, inputs))


def relative_difference(expected: torch.Tensor, received: torch.Tensor) -> float:
    """max |a - b| / max |a|."""
    scale = expected.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    return float((expected.double() - received.double()).abs().max() / scale)


def result_of(model: nn.Module, inputs: Mapping[str, torch.Tensor], words: torch.Tensor | None = None) -> torch.Tensor:
    """All that is compared of an answer, flat; of the logits of a language model only those of the tokens `words`."""
    name = type(model).__name__
    if name.endswith("ForMultipleChoice"):  # asks for (batch, choices, length), which no export is compared on
        raise UserError(
            f"{name}: takes several texts an answer; allowed: models that take one. Save its base model alone"
        )
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    model.train(training)
    found = {key: output[key] for key in OUTPUTS if key in output}
    if not found:
        raise UserError(f"{name}: gives none of {', '.join(OUTPUTS)}; got {', '.join(output)}")
    if words is not None:
        found["logits"] = found["logits"].index_select(-1, words)
    return torch.cat([value.flatten() for value in found.values()])
