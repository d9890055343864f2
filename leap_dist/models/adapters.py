"""LoRA adapters (PEFT) on a model with zeros: trained and merged under the mask, so that the zeros stay.

A plain adapter adds B·A to every weight, the removed ones too: merged, none is zero any more. Here it adds (B·A) ⊙ M,
M = the base weight is not zero, in the forward pass and when it is merged: what is merged is what was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from leap_dist.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


def hold_zeros(model: PeftModel) -> int:
    """Make the LoRA adapters of `model` leave at zero what is zero in its weights; returns how many weights that are.

    Call it when the adapters are there (new, or loaded), before training. Then train, and merge with PEFT's own
    `model.merge_and_unload()`: its zeros are the same, and its logits are those of the model with its adapters. The
    adapters' files are as PEFT writes them. A forward pass makes B·A of the weight's size for every adapted matrix.

    UserError, with nothing changed, if an adapter cannot be held: one that is not a plain LoRA of a linear layer (an
    embedding, DoRA, a quantised layer), or is merged already; if it began by changing the weights (PiSSA); or if what
    has zeros is trained itself (modules_to_save, biases).
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise UserError(
            f"model: got {type(model).__name__}; allowed: a PEFT model with its adapters, as get_peft_model and "
            "PeftModel.from_pretrained give it"
        )
    _refuse_lost_zeros(model)
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    zeros = {name: _num_zeros(layer.get_base_layer()) for name, layer in layers.items()}
    held = {name: layer for name, layer in layers.items() if zeros[name]}
    for name, layer in held.items():
        if problem := _problem(layer):
            raise UserError(
                f"model: {name} has {zeros[name]:,} zeros, and {problem}: merged, they would be lost; allowed: plain "
                "LoRA on linear layers, not merged yet; leave that layer out of target_modules, or set another LoRA"
            )
    variant = _masked_lora()
    for layer in held.values():
        layer.lora_variant.update(dict.fromkeys(layer.lora_A, variant))
    return sum(zeros.values())


def _refuse_lost_zeros(model: PeftModel) -> None:
    """UserError where zeros were lost before, or nothing holds them: a bias that is all zeros is a new one."""
    changing = ("pissa", "olora", "loftq", "corda", "lora_ga")
    for config in model.peft_config.values():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(changing):
            raise UserError(
                f'model: init_lora_weights "{start}" has changed the weights, their zeros too; allowed: true, or '
                '"gaussian", on the model as it was exported'
            )
    for name, tensor in model.named_parameters():
        own = ".modules_to_save." in name or name.endswith(".bias")
        zeros = int((tensor == 0).sum()) if own and tensor.requires_grad else 0
        if zeros and (tensor.dim() > 1 or zeros < tensor.numel()):
            raise UserError(
                f"model: {name} has {zeros:,} zeros and is trained itself, so that they would be lost; leave it out of "
                'modules_to_save, or set bias to "none"'
            )


def _num_zeros(layer: nn.Module) -> int:
    """Weights of the adapted layer that are zero; of one with several tensors (fused experts) in all of them."""
    return sum(int((tensor == 0).sum()) for tensor in layer.parameters(recurse=False) if tensor.dim() > 1)


def _problem(layer: Any) -> str | None:
    """Why an adapter cannot be held to the zeros of its layer; None where it can."""
    from peft.tuners import lora

    if type(layer) is not lora.Linear or not isinstance(layer.get_base_layer().weight, nn.Parameter):
        return f"its adapter is {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    if any(layer.lora_bias.values()):  # merged, it is added where a removed unit's bias is zero
        return "its adapter has a bias of its own (lora_bias)"
    if layer.merged:
        return "its adapter is merged already"
    others = [variant for variant in layer.lora_variant.values() if type(variant).__name__ != "MaskedLora"]
    return f"its adapter is {type(others[0]).__name__.removesuffix('LinearVariant')}" if others else None


def _masked_lora() -> Any:
    """A variant of LoRA, as PEFT has them: where a layer has one, PEFT calls it to compute, merge and unmerge."""
    from peft.tuners.lora.layer import LoraVariant

    class MaskedLora(LoraVariant):
        @staticmethod
        def init(module: Any, adapter_name: str, **settings: Any) -> None:
            pass

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **settings: Any) -> Tensor:
            added = _added(module, active_adapter)
            weight = added.T if module.fan_in_fan_out else added
            return result + F.linear(module.lora_dropout[active_adapter](x), weight)

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight + _added(module, active_adapter).to(orig_weight.dtype)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
            orig_weight.data += _added(module, active_adapter).to(orig_weight.dtype)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight - _added(module, active_adapter).to(orig_weight.dtype)

        def supports_lora_conversion(self) -> bool:
            return False

    return MaskedLora()


def _added(layer: Any, adapter: str) -> Tensor:
    """(B·A) ⊙ M in the shape of the layer's weight."""
    added: Tensor = layer.get_delta_weight(adapter)
    return added * (layer.get_base_layer().weight != 0)
