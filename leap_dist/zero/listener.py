"""The listener: hooks on a hosted model that report what gated layers are given, until scores have their start.

Counted are forward passes in training mode; a recomputation in the backward pass (activation checkpointing) is not, nor
is an evaluation. As long as a model was never seen in training mode, passes with gradients count: loops forget
`engine.train()`. Padding is left out where the transformers model around a layer was given an attention mask of (batch,
length).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from leap_dist.core.inputs import Inputs
from leap_dist.models.inputs import shows_inputs, shows_products
from leap_dist.models.views import Owners
from leap_dist.zero.products import Products


class _Call(NamedTuple):
    """What a transformers model was called with: its mask, and the states of an encoder with theirs."""

    mask: Any
    states: Any
    states_mask: Any


ARGUMENTS = _Call("attention_mask", "encoder_hidden_states", "encoder_attention_mask")


class Listener:
    """Reports to `inputs` what the layers of `model` are given, as long as it asks for that."""

    def __init__(self, model: nn.Module, inputs: Inputs, on: bool) -> None:
        self._model, self._inputs = ref(model), inputs
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._products: list[Products] = []
        self._trained = False
        inputs.listen = self.listen
        self.listen(on)

    def listen(self, on: bool) -> None:
        """Put the hooks on the model, or take them away; what is so already stays."""
        model = self._model()
        if not on:
            self.remove()
        elif model is not None and not self._handles:
            self._handles = [*self._on_layers(model), *self._on_models(model)]

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def _on_layers(self, model: nn.Module) -> Iterator[RemovableHandle]:
        owners = Owners(model)
        experts: dict[nn.Module, dict[str, str]] = {}
        for name in self._inputs.axes:
            for owner in owners.of(name):
                if shows_inputs(owner):
                    yield owner.module.register_forward_pre_hook(partial(self._see, name), with_kwargs=True)
                elif shows_products(owner):
                    experts.setdefault(owner.module, {})[owner.local] = name
        for module, names in experts.items():
            yield module.register_forward_pre_hook(partial(self._enter_experts, names), with_kwargs=True)
            yield module.register_forward_hook(self._leave_experts, always_call=True)

    def _on_models(self, model: nn.Module) -> Iterator[RemovableHandle]:
        from transformers import PreTrainedModel

        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                places = list(inspect.signature(module.forward).parameters)
                yield module.register_forward_pre_hook(partial(self._enter, places), with_kwargs=True, prepend=True)
                yield module.register_forward_hook(self._leave, always_call=True)

    @torch.compiler.disable
    def _enter(self, places: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(places, args, strict=False)) | kwargs
        self._calls.append(_Call(*(given.get(name) for name in ARGUMENTS)))

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._calls:
            self._calls.pop()

    @torch.compiler.disable
    def _see(self, tensor: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts():
            return
        x = [*args, *kwargs.values()][0].detach()  # or checkpointing would miss what autograd saves here
        convolves = isinstance(module, _ConvNd)
        self._inputs.see(tensor, x.movedim(_channels(module), -1) if convolves else self._without_padding(x))

    @torch.compiler.disable
    def _enter_experts(
        self, names: dict[str, str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._counts():
            x = [*args, *kwargs.values()][0]
            weights = {name: getattr(module, local) for local, name in names.items()}
            self._products.append(Products(self._inputs, weights, x, self._kept(x)))
            self._products[-1].__enter__()

    @torch.compiler.disable
    def _leave_experts(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._products:
            self._products.pop().__exit__(None, None, None)

    def _counts(self) -> bool:
        if torch._C._current_graph_task_id() != -1:  # a backward pass
            return False
        model = self._model()
        training = model is not None and model.training
        self._trained |= training
        return training or self._inputs.calibrating or (torch.is_grad_enabled() and not self._trained)

    def _without_padding(self, x: Tensor) -> Tensor:
        """The rows of (batch, length, ...) or (batch * length, features) with zeros in the place of padding."""
        kept = self._kept(x)
        return x if kept is None else torch.where(kept.view(*kept.shape, *[1] * (x.dim() - kept.dim())), x, 0.0)

    def _kept(self, x: Tensor) -> Tensor | None:
        """Which rows are no padding, bool of (batch, length) or (batch * length,); None where that is not known."""
        mask = self._mask_of(x)
        if mask is None or x.dim() < 2:
            return None
        whole = x.dim() > 2 and x.shape[:2] == mask.shape  # of two axes the second is features, whatever its length
        if not whole and (x.dim() > 2 or len(x) != mask.numel()):
            return None
        kept = mask.to(x.device) != 0
        return kept if whole else kept.flatten()

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of what the innermost model around a layer works on, or of the encoder's states where x is those."""
        for call in reversed(self._calls):
            states = call.states
            if isinstance(states, Tensor) and states.shape == x.shape and states.data_ptr() == x.data_ptr():
                return call.states_mask if _is_mask(call.states_mask) else None
            if call.mask is None or _is_mask(call.mask):
                mask: Tensor | None = call.mask
                return mask
        return None


def _channels(module: Any) -> int:
    """The axis of a convolution's inputs that counts channels."""
    return -1 - len(module.kernel_size)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2
