"""Fused experts of architectures that no table lists: pruned by default, along their inputs, and in the saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from leap_dist.config.job_file import parse_job
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.tasks.conftest import speaker  # noqa: F401

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},  # (inputs, outputs) in memory
    "deepseek_v3": MLA
    | {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}


def prune(folder: str, job: dict[str, Any]) -> None:
    from leap_dist.train.loop import run_job

    run_job(parse_job(job), Path(folder), False, this_rank())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_experts_are_pruned_by_default(
    ranks: RankPools,
    tmp_path: Path,
    speaker: Any,  # noqa: F811
    kind: str,
    world: int,
    stage: int,
) -> None:
    speaker.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("A model that is smaller answers sooner. " * 40)
    data = {"task": "lm", "train": str(tmp_path / "text.txt"), "validation": str(tmp_path / "text.txt")}
    job: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "model": {"from_config": SMALL | MODELS[kind] | {"model_type": kind, "vocab_size": len(speaker)}},
        "data": data | {"max_length": 16, "tokenizer": str(tmp_path / "tokenizer")},
        "train": {"max_steps": 10, "learning_rate": 1e-3},
        "leap": {"target": 0.5, "gates": ["row" if kind == "gpt_oss" else "2:4"]},
        "tracking": {"mlflow_uri": None},
    }
    ranks(world).run(prune, str(tmp_path / "run"), job, timeout=300)
    tensors = json.loads((tmp_path / "run" / "certificate.json").read_text())["tensors"]
    experts = {name: own["density"] for name, own in tensors.items() if name.endswith(("gate_up_proj", "down_proj"))}
    assert len(experts) >= 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    for name, density in experts.items():
        weight = model.get_parameter(name)
        if kind == "gpt_oss":  # whole outputs
            assert set(weight.count_nonzero(1).flatten().tolist()) <= {0, weight.shape[1]}, name
            assert weight.count_nonzero() == pytest.approx(density * weight.numel())
        else:
            assert density == 0.5 and (weight.reshape(-1, 4).count_nonzero(1) == 2).all(), name
