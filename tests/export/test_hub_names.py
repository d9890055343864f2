"""Of every folder that stock engines load: experts lie one by one, as on the hub, and read back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from leap_dist.export.engines import HUGGING_FACE, VLLM
from leap_dist.export.kinds import export_run
from leap_dist.models.pruned_folder import load_pruned, save_pruned
from leap_dist.run_folder import read_run
from tests.export.runs import make_run

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 12}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    | {"norm_topk_prob": True},
}
IDS = torch.arange(1, 15).view(2, 7)


HUB_NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.{}.{}.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.{}.{}.weight",
}
MATRICES = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("down_proj", "gate_proj", "up_proj")}


@pytest.mark.parametrize(
    ("kind", "granularity"), [("mixtral", "neuron"), ("mixtral", "expert"), ("qwen3_moe", "expert")]
)
def test_experts_have_the_names_of_the_hub(kind: str, granularity: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | EXPERTS[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    alive = torch.tensor([True, False, True, True])
    masks = {
        name: alive.view(-1, *[1] * (value.dim() - 1)).expand(value.shape).clone()
        for name, value in model.named_parameters()
        if granularity == "expert" and ("experts" in name or name.endswith("gate.weight"))
    }
    query = "model.layers.0.self_attn.q_proj.weight"
    masks[query] = torch.rand_like(model.get_parameter(query)) < 0.5
    run = read_run(make_run(tmp_path / "run", model, masks, granularity))
    kinds = ["hf", "shrunk"]
    *_, small = export_run(run, kinds, tmp_path / "export", threads=1, latency=False)
    assert {engine.name for engine in small.engines if engine.loads} >= {HUGGING_FACE, VLLM}
    for number, name in ((4, "hf"), (4 - (granularity == "expert"), "shrunk")):
        folder = tmp_path / "export" / name
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {key for key in file.keys() if ".experts" in key}  # noqa: SIM118
        assert found == {HUB_NAMES[kind].format(i, matrix) for i in range(number) for matrix in MATRICES[kind]}
        stock = AutoModelForCausalLM.from_pretrained(folder)
        if name == "hf":
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in stock.state_dict().items())
        else:
            pruned = load_pruned(folder)
            assert all(torch.equal(value, stock.state_dict()[key]) for key, value in pruned.state_dict().items())
            assert torch.equal(stock(input_ids=IDS).logits, pruned(input_ids=IDS).logits)
            save_pruned(pruned, tmp_path / "again", like=folder)
            with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
                assert found <= set(file.keys())
            load_pruned(tmp_path / "again")
