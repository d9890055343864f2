"""What is known about architectures: where their blocks are, and which tensors are pruned by default.

Default are the weights of linear layers, found by the modules that own them, and fused experts. Embeddings, norms,
routers, and the heads that turn hidden states into answers (classifiers, poolers, language-model heads) stay dense,
as in the paper; body.py tells them apart by structure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FamilyConfig, FfnFamily
from leap_dist.models.body import find_routers, is_transformers, stacked


def prunable_matrices(model: nn.Module, family: FamilyConfig | None = None) -> list[str]:
    """Names of the weights that gates cover by default, in the order of the model's parameters.

    In a transformers model the linear weights in the layers of its body but those of routers, and the fused weights of
    experts; in a model that is no stack of layers all linear weights but the last, which gives the answer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    layers = stacked(model) if is_transformers(model) else ()
    if layers:
        dense = tuple(f"{router}." for router in find_routers(model))
        answer = model.get_output_embeddings()  # type: ignore[operator]
        modules = dict(model.named_modules())
        names = [
            n for n in names if n.startswith(layers) and not f"{n}.".startswith(dense) and modules[n] is not answer
        ]
    else:
        names = names[:-1]
    family = family or family_of(model)
    fused = tuple(f".{tensor}" for block in family.experts for tensor in block.tensors) if family else ()
    chosen = {f"{name}.weight" for name in names} | {n for n in fused_experts(model) if n.startswith(layers)}
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [name for name in every if name in chosen or name.endswith(fused)]


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Linear layers in the body whose weight is no parameter but made from others, and what makes it."""
    layers = (stacked(model) if is_transformers(model) else ()) or ("",)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if linear and name.startswith(layers) and f"{name}.weight".removeprefix(".") not in own:
            parametrized = getattr(getattr(module, "parametrizations", None), "weight", ())
            makers = [type(maker).__name__ for maker in (*parametrized, *module._forward_pre_hooks.values())]
            found[name] = ", ".join(makers) or "something else"
    return found


def fused_experts(model: nn.Module) -> Iterator[str]:
    """Names of the weights that hold all experts of a block, a matrix each.

    transformers gives them no layers of their own, in some sixty architectures; it calls their modules ...Experts.
    """
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if is_fused(module, name):
                yield f"{path}.{name}".removeprefix(".")


def is_fused(module: nn.Module, local: str) -> bool:
    """Whether a module's own parameter holds a matrix for each of many experts."""
    parameter = getattr(module, local)
    return "Experts" in type(module).__name__ and len(getattr(parameter, "ds_shape", parameter.shape)) == 3


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is transposed: (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def family_of(model: nn.Module) -> FamilyConfig | None:
    """The built-in table for a model, or None."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


# ---------------------------------------------------------------------------------------------- tables


def _bert(self_module: str = "attention.self", **changes: Any) -> AttentionFamily:
    """An attention block as BERT names it."""
    fields = {
        "module": self_module,
        "query": f"{self_module}.query",
        "key": f"{self_module}.key",
        "value": f"{self_module}.value",
        "output": "attention.output.dense",
        "head_size": f"{self_module}.attention_head_size",
        "resize": (f"{self_module}.num_attention_heads", f"{self_module}.all_head_size"),
    }
    return AttentionFamily.model_validate(fields | changes)


def _llama(**changes: Any) -> AttentionFamily:
    """An attention block as Llama names it."""
    fields = {
        "module": "self_attn",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "head_size": "self_attn.head_dim",
        "config": ("num_attention_heads", "num_key_value_heads"),
        "config_head_size": "head_dim",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
    }
    return AttentionFamily.model_validate(fields | changes)


def _t5(module: str, **changes: Any) -> AttentionFamily:
    """An attention block as T5 names it."""
    fields = {
        "module": module,
        "query": f"{module}.q",
        "key": f"{module}.k",
        "value": f"{module}.v",
        "output": f"{module}.o",
        "head_size": f"{module}.key_value_proj_dim",
        "resize": (f"{module}.n_heads", f"{module}.inner_dim"),
        "position_bias": True,
    }
    return AttentionFamily.model_validate(fields | changes)


BERT_FFN = FfnFamily(
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    config=("intermediate_size",),
)
BERT = FamilyConfig(
    layers=(r"re:(.+\.)?encoder\.layer\.\d+",),
    attention=(
        _bert(),
        _bert("crossattention.self", role="cross_attention", output="crossattention.output.dense"),
    ),
    ffn=(BERT_FFN,),
    hidden=("hidden_size", "embedding_size", "pooler_hidden_size"),
)
DISTILBERT = FamilyConfig(
    layers=(r"re:(.+\.)?transformer\.layer\.\d+",),
    attention=(
        AttentionFamily(
            module="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            head_size="attention.attention_head_size",
            resize=("attention.n_heads",),
        ),
    ),
    ffn=(FfnFamily(module="ffn", up="ffn.lin1", down="ffn.lin2", activation="ffn.activation", config=("hidden_dim",)),),
    hidden=("dim",),
)
DEBERTA = FamilyConfig(
    layers=BERT.layers,
    attention=(
        _bert(
            query=None,
            key=None,
            value=None,
            qkv="attention.self.in_proj",
            layout="interleaved",
            value_bias="attention.self.v_bias",
            follow=(
                "attention.self.q_bias",
                "attention.self.v_bias",
                "attention.self.pos_proj",
                "attention.self.pos_q_proj",
            ),
            unless="attention.self.head_logits_proj",
        ),
    ),
    ffn=(BERT_FFN,),
    results=("attention",),
    hidden=("hidden_size", "embedding_size", "pooler_hidden_size"),
)
DEBERTA_V2 = FamilyConfig(
    layers=BERT.layers,
    attention=(
        _bert(
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            follow=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        ),
    ),
    ffn=(BERT_FFN,),
    results=("attention",),
    hidden=("hidden_size", "embedding_size", "pooler_hidden_size"),
    after_first="conv",
)
ALBERT = FamilyConfig(
    layers=(r"re:(.+\.)?albert_layers\.\d+",),
    attention=(_bert("attention", output="attention.dense", norm="attention.LayerNorm"),),
    ffn=(FfnFamily(up="ffn", down="ffn_output", activation="activation", config=("intermediate_size",)),),
    shared=True,
    hidden=("hidden_size",),
)
GPT2 = FamilyConfig(
    layers=(r"re:(.+\.)?h\.\d+",),
    attention=(
        AttentionFamily(
            module="attn",
            qkv="attn.c_attn",
            output="attn.c_proj",
            head_size="attn.head_dim",
            resize=("attn.num_heads", "attn.split_size"),
        ),
    ),
    ffn=(FfnFamily(module="mlp", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act", config=("n_inner",)),),
    adds=True,
    hidden=("n_embd",),
)
OPT = FamilyConfig(
    layers=(r"re:(.+\.)?decoder\.layers\.\d+",),
    attention=(_llama(output="self_attn.out_proj", resize=("self_attn.num_heads",), config=(), config_head_size=None),),
    ffn=(FfnFamily(up="fc1", down="fc2", activation="activation_fn", config=("ffn_dim",)),),
    adds="do_layer_norm_before",
    hidden=("hidden_size", "word_embed_proj_dim"),
)
LLAMA_FFN = FfnFamily(
    module="mlp",
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    resize=("mlp.intermediate_size",),
    config=("intermediate_size",),
)
LLAMA = FamilyConfig(
    layers=(r"re:(.+\.)?layers\.\d+",),
    attention=(_llama(),),
    ffn=(LLAMA_FFN,),
    adds=True,
    hidden=("hidden_size",),
    epsilon="rms_norm_eps",
)
GEMMA = LLAMA.model_copy(
    update={
        "norm_adds_one": True,
        "scaled_embeddings": True,
        "output_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }
)
PHI3 = FamilyConfig(
    layers=LLAMA.layers,
    attention=(
        _llama(
            query=None,
            key=None,
            value=None,
            query_norm=None,
            key_norm=None,
            qkv="self_attn.qkv_proj",
            resize=("self_attn.num_key_value_heads", "self_attn.config.num_attention_heads"),
        ),
    ),
    ffn=(
        FfnFamily(
            module="mlp",
            gate_up="mlp.gate_up_proj",
            down="mlp.down_proj",
            activation="mlp.activation_fn",
            config=("intermediate_size",),
        ),
    ),
    adds=True,
    hidden=LLAMA.hidden,
    epsilon=LLAMA.epsilon,
)
EXPERTS = ExpertsFamily(
    module="mlp",
    router="mlp.gate",
    tensors=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    top_k=("mlp.gate.top_k",),
    resize=("mlp.gate.num_experts", "mlp.experts.num_experts"),
    config=("num_local_experts",),
    config_top_k="num_experts_per_tok",
)
MIXTRAL = FamilyConfig(
    layers=LLAMA.layers,
    attention=(_llama(),),
    experts=(EXPERTS.model_copy(update={"top_k": ("mlp.gate.top_k", "mlp.top_k")}),),
    adds=True,
    hidden=LLAMA.hidden,
    epsilon=LLAMA.epsilon,
)
QWEN3_MOE = LLAMA.model_copy(update={"experts": (EXPERTS,)})
T5 = FamilyConfig(
    layers=(r"re:(.+\.)?block\.\d+\.layer\.\d+",),
    attention=(
        _t5("SelfAttention", anchor="SelfAttention.relative_attention_bias"),
        _t5("EncDecAttention", role="cross_attention"),
    ),
    ffn=(
        FfnFamily(
            module="DenseReluDense",
            up="DenseReluDense.wi",
            down="DenseReluDense.wo",
            activation="DenseReluDense.act",
            config=("d_ff",),
        ),
        FfnFamily(
            module="DenseReluDense",
            gate="DenseReluDense.wi_0",
            up="DenseReluDense.wi_1",
            down="DenseReluDense.wo",
            activation="DenseReluDense.act",
            config=("d_ff",),
        ),
    ),
    whole=(r"re:(.+\.)?block\.\d+",),
    adds=True,
    results=("position_bias", "encoder_decoder_position_bias"),
    depth=("num_layers", "num_decoder_layers"),
    hidden=("d_model",),
    epsilon="layer_norm_epsilon",
    scaled_output="decoder.final_layer_norm",
)
VIT = FamilyConfig(
    layers=(r"re:(.+\.)?layers\.\d+",),
    attention=(
        AttentionFamily(
            module="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            output="attention.o_proj",
            head_size="attention.head_dim",
            resize=("attention.num_attention_heads",),
            config=("num_attention_heads",),
            config_head_size="head_dim",
        ),
    ),
    ffn=(
        FfnFamily(
            module="mlp",
            up="mlp.fc1",
            down="mlp.fc2",
            activation="mlp.activation_fn",
            config=("intermediate_size",),
        ),
    ),
    adds=True,
    hidden=("hidden_size", "pooler_output_size"),
)

FAMILIES: dict[str, FamilyConfig] = {
    "albert": ALBERT,
    "bert": BERT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "distilbert": DISTILBERT,
    "electra": BERT,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "roberta": BERT,
    "t5": T5,
    "vit": VIT,
}
"""By the model_type of transformers' configs."""
