"""How an architecture names its heads, neurons and experts: built-in tables, and a job's `family` section.

All names are paths relative to one layer of the model; `layers` says where the layers are. In a layer that lacks
the modules of a block (mixed dense and expert layers, encoder and decoder), that block is not looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from leap_dist.config.section import Conflict, Names, Patterns, Section, as_objects


class AttentionFamily(Section):
    """An attention block. Its units are heads, or groups of query heads that share a key and a value head."""

    role: str = Field(default="attention", min_length=1, description="a name for blocks that are alike")
    module: str = Field(description="the module whose forward attends")
    """It is replaced when no head is left."""
    query: str | None = Field(default=None, description="the module that makes queries; or give qkv")
    key: str | None = Field(default=None, description="the module that makes keys; or give qkv")
    value: str | None = Field(default=None, description="the module that makes values; or give qkv")
    qkv: str | None = Field(default=None, description="the one module that makes all three")
    layout: Literal["stacked", "interleaved"] = Field(default="stacked", description='"stacked" or "interleaved"')
    """Rows of qkv: all queries, all keys, all values; or query, key, value of head 0, then of head 1."""
    output: str = Field(description="the module that maps the heads back to the model's width")
    head_size: int | str = Field(description="rows of a head: an integer, or the attribute that holds it")
    value_bias: str | None = Field(default=None, description="a parameter added to the values outside their module")
    follow: Names = Field(default=(), description="more modules or parameters with rows for each query head")
    """Used where they exist."""
    resize: Names = Field(default=(), description="attributes that are proportional to the number of heads")
    """"config.<key>" at the end of the path: the module gets a config of its own."""
    config: Names = Field(default=(), description="keys of the model's config that are proportional to it")
    config_head_size: str | None = Field(default=None, description="the key of the model's config for head_size")
    """Without one, a model with fewer heads has no config of its own."""
    unless: str | None = Field(default=None, description="a module; where it exists, heads are mixed and stay")
    anchor: str | None = Field(default=None, description="a module; where it exists, other layers need this block")
    """One head stays, and the block never leaves as a whole."""
    position_bias: bool = Field(default=False, description="true or false")
    """The block is given a bias of all heads and hands it on to the next one, as the second of three results."""
    norm: str | None = Field(default=None, description="a norm of input plus output inside the module")
    query_norm: str | None = Field(default=None, description="a norm of a head's queries, where it exists")
    key_norm: str | None = Field(default=None, description="a norm of a head's keys, where it exists")

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        fused = raw.get("qkv") is not None
        apart = [key for key in ("query", "key", "value") if raw.get(key) is not None]
        if fused != bool(apart) and len(apart) in (0, 3):
            return []
        received = " and ".join([*apart, *(["qkv"] if fused else [])]) or "none of them"
        return [("qkv", f"got {received}; allowed: qkv alone, or query, key and value")]


class FfnFamily(Section):
    """A feed-forward block; its units are neurons. down(act(up x)), or down(act(gate x) * up x)."""

    role: str = Field(default="ffn", min_length=1, description="a name for blocks that are alike")
    module: str = Field(default="", description="the module of the block; empty: the layer itself")
    up: str | None = Field(default=None, description="the module that makes the neurons; or give gate_up")
    gate: str | None = Field(default=None, description="the module whose activation multiplies up, or null")
    gate_up: str | None = Field(default=None, description="the one module that makes gate, then up")
    down: str = Field(description="the module that maps the neurons back to the model's width")
    activation: str | None = Field(default=None, description="the activation, or null if it is not an attribute")
    resize: Names = Field(default=(), description="attributes that are proportional to the number of neurons")
    config: Names = Field(default=(), description="keys of the model's config that are proportional to it")

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        given = [key for key in ("up", "gate", "gate_up") if raw.get(key) is not None]
        if given in (["up"], ["up", "gate"], ["gate_up"]):
            return []
        return [("up", f"got {' and '.join(given) or 'nothing'}; allowed: up, up and gate, or gate_up alone")]


class ExpertsFamily(Section):
    """A mixture-of-experts block with fused weights; its units are experts."""

    role: str = Field(default="experts", min_length=1, description="a name for blocks that are alike")
    module: str = Field(description="the module of the block; it maps hidden states to hidden states")
    router: str = Field(
        description="the module that chooses, by a softmax of its logits; it returns logits, scores and indices"
    )
    """Its weight has a row for each expert."""
    tensors: Names = Field(min_length=1, description="parameters whose first axis counts experts")
    top_k: Names = Field(default=(), description="attributes that say how many experts a token gets")
    resize: Names = Field(default=(), description="attributes that are proportional to the number of experts")
    config: Names = Field(default=(), description="keys of the model's config that are proportional to it")
    config_top_k: str | None = Field(default=None, description="the key of the model's config that top_k comes from")


class FamilyConfig(Section):
    """Where the blocks of an architecture are. Paths are relative to a layer, except `layers` itself."""

    layers: Patterns = Field(min_length=1, description='module paths, or "re:<pattern>" for whole paths of layers')
    attention: Annotated[tuple[AttentionFamily, ...], BeforeValidator(as_objects)] = Field(
        default=(), description="an attention block, or a list of them"
    )
    ffn: Annotated[tuple[FfnFamily, ...], BeforeValidator(as_objects)] = Field(
        default=(), description="a feed-forward block, or a list of them"
    )
    experts: Annotated[tuple[ExpertsFamily, ...], BeforeValidator(as_objects)] = Field(
        default=(), description="a mixture-of-experts block, or a list of them"
    )
    shared: bool = Field(default=False, description="true or false")
    """One layer's weights are used at several depths: no block leaves as a whole."""
    whole: Patterns = Field(default=(), description='module paths, or "re:<pattern>" for whole paths of layers')
    """The layers that gate "depth" takes out, where `layers` are parts of them; empty: the same."""
    adds: bool | str = Field(default=False, description="true, false, or the attribute of a layer that says so")
    """A layer adds what its blocks give to what it is given, and changes nothing else: one whose blocks give nothing
    can leave. False: a norm follows the sum."""
    results: Names = Field(default=(), description="names of what a layer returns after the hidden states")
    """An argument of that name is handed on by a layer that left; others are null."""
    after_first: str | None = Field(default=None, description="a module beside the layers that follows the first one")
    """Where it exists, the first layer stays."""
    depth: Names = Field(default=("num_hidden_layers",), description="keys of the model's config for the layers")
    """One for each list of layers, in the model's order."""
    hidden: Names = Field(default=(), description="keys of the model's config for the width of its residual stream")
    """The first is the width; the others are as large where they are now. Empty: gate "hidden" is not known."""
    epsilon: str | None = Field(default=None, description="the key of the model's config for the epsilon of its norms")
    """Of root-mean-square norms."""
    norm_adds_one: bool = Field(default=False, description="true or false")
    """Root-mean-square norms multiply by one plus their weight."""
    scaled_embeddings: bool = Field(default=False, description="true or false")
    """Embeddings are multiplied by the root of the width."""
    output_norms: Names = Field(default=(), description="norms in a layer of what its blocks give, before the sum")
    scaled_output: str | None = Field(default=None, description="the norm before a head that divides by that root")
    """Where the config says scale_decoder_outputs."""
