"""What the passes of one micro-batch hold beside the weights: activations for the backward pass, and logits.

Counted, not estimated: a forward pass over a model on the meta device, in which every tensor that autograd keeps is
noted once. What an operation takes for its own time is not counted, nor are the caches of allocators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from leap_dist.ops.words import CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32 = 4  # bytes


def activation_bytes(model: PreTrainedModel, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass over (batch, length) tokens, the head left out.

    model: on the meta device; in training mode and in `dtype` from then on. Raises whatever its code does where that
    asks for values, which no tensor has there.
    """
    torch.nn.Module.to(model, dtype=dtype).train()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}  # kept alive, so that no storage takes the place of another

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        model.base_model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def word_bytes(num_words: int, width: int, tokens: int, size: int) -> int:
    """Bytes of the loss of predicted words by chunks: a chunk's logits and its gradient, and the head's own gradient.

    width: of the hidden states; size: bytes of a hosted number.
    """
    chunk = min(CHUNK, tokens * num_words)
    copies = 2 * FP32 + (size if size < FP32 else 0)  # logits, their gradient over the count, and that as it is hosted
    return chunk * copies + (num_words + tokens) * width * size


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels keep it: inputs, output and one number a query; on the meta device it is unfused."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        raise NotImplementedError("only the forward pass is counted")
