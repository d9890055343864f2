"""Heads, neurons and experts pruned under ZeRO on several ranks, exported, shrunk and loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import tiny
from tests.ranks import RankPools

STEPS = 12


def prune(
    kind: str,
    folder: Path,
    stage: int,
    leap: dict[str, Any],
    settings: dict[str, Any],
    head: str = "AutoModelForCausalLM",
) -> dict[str, Any]:
    """Train and prune a tiny model on this rank's random tokens; rank 0 exports it to `folder`. The certificate."""
    import leap_dist
    from leap_dist.export.hf import save_model
    from leap_dist.zero.engine import gather_weights

    model = tiny(kind, head, **settings).train()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "train": {"learning_rate": 1e-2},
        "leap": {"total_steps": STEPS, **leap},
        "steps_per_print": 10**9,
    }
    engine, *_ = leap_dist.initialize(model=model, config=config)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(STEPS):
        tokens = torch.randint(3, 64, (4, 12), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    certificate: dict[str, Any] = leap_dist.finalize(engine)
    rank = torch.distributed.get_rank()
    save_model(engine.module, gather_weights(engine), folder, rank=rank)
    engine.eval()
    with torch.no_grad():
        certificate["logits"] = engine(input_ids=torch.arange(3, 15)[None]).logits
    engine.destroy()
    return certificate


def shrunk_logits(folder: Path, target: Path) -> tuple[torch.nn.Module, torch.Tensor, dict[str, list[int]]]:
    """Shrink the export at `folder`, save it to `target` and load that: the model, its logits, what is left."""
    import leap_dist
    from leap_dist.export.hf import load_exported
    from leap_dist.models.pruned_folder import save_shrunk
    from leap_dist.models.shrink import shrink_

    model = load_exported(folder)
    kept = shrink_(model)
    save_shrunk(model, kept, target)
    loaded = leap_dist.load_pruned(target)
    with torch.no_grad():
        return loaded, loaded(input_ids=torch.arange(3, 15)[None]).logits, kept


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ((a - b).abs().max() / a.abs().max()).item() <= 1e-5


@pytest.mark.long
def test_a_llama_of_20_layers_under_zero_3_loses_heads_and_neurons(ranks: RankPools, tmp_path: Path) -> None:
    leap = {"target": 0.6, "gates": ["head", {"granularity": "neuron", "multiple_of": 2}]}
    results = ranks(2).run(prune, "llama", tmp_path / "hf", 3, leap, {"num_hidden_layers": 20, "intermediate_size": 48})
    first, second = results
    assert first["masks_sha256"] == second["masks_sha256"] and first["weights_sha256"] == second["weights_sha256"]
    assert abs(first["kept"] - 0.6 * first["prunable"]) <= first["unit"]
    model, logits, kept = shrunk_logits(tmp_path / "hf", tmp_path / "shrunk")
    assert close(first["logits"], logits)
    neurons = [len(units) for name, units in kept.items() if name.endswith("mlp")]
    heads = [len(units) for name, units in kept.items() if name.endswith("self_attn")]
    assert len(neurons) == len(heads) == 20 and all(num % 2 == 0 for num in neurons)
    assert len(set(neurons)) > 1 or len(set(heads)) > 1  # no plan for all layers alike
    left = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert left == first["kept"]


def test_a_uniform_plan_gives_a_stock_model(ranks: RankPools, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = {"uniform": True}
    gates = [{"granularity": "head", **options}, {"granularity": "neuron", "multiple_of": 8, **options}]
    first, *_ = ranks(2).run(prune, "llama", tmp_path / "hf", 2, {"target": 0.5, "gates": gates}, {})
    _, logits, kept = shrunk_logits(tmp_path / "hf", tmp_path / "shrunk")
    assert len({len(units) for name, units in kept.items() if name.endswith("mlp")}) == 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk").eval()
    with torch.no_grad():
        assert close(first["logits"], stock(input_ids=torch.arange(3, 15)[None]).logits)
    assert torch.equal(logits, leap_logits(tmp_path / "shrunk"))


def leap_logits(folder: Path) -> torch.Tensor:
    import leap_dist

    with torch.no_grad():
        logits: torch.Tensor = leap_dist.load_pruned(folder)(input_ids=torch.arange(3, 15)[None]).logits
    return logits


@pytest.mark.parametrize(("kind", "stage"), [("mixtral", 3), ("qwen3_moe", 2)])
def test_experts_that_were_pruned_are_not_routed_to(ranks: RankPools, tmp_path: Path, kind: str, stage: int) -> None:
    first, *_ = ranks(2).run(prune, kind, tmp_path / "hf", stage, {"target": 0.5, "gates": ["expert"]}, {})
    assert abs(first["kept"] - 0.5 * first["prunable"]) <= first["unit"]
    model, logits, kept = shrunk_logits(tmp_path / "hf", tmp_path / "shrunk")
    assert close(first["logits"], logits)
    experts = {name: units for name, units in kept.items() if hasattr(model.get_submodule(name), "experts")}
    for name, units in experts.items():
        block = model.get_submodule(name)
        assert block.gate.weight.shape[0] == block.experts.num_experts == len(units)
        assert block.experts.gate_up_proj.shape[0] == block.experts.down_proj.shape[0] == len(units)
    assert sum(map(len, experts.values())) == 2 * len(experts)


HYBRID, DEEP = ["hidden", "head", "neuron"], {"num_hidden_layers": 4}
WHOLE: list[tuple[str, int, dict[str, Any], str, dict[str, Any]]] = [
    ("bert", 2, {"target": 0.5, "gates": ["depth"]}, "AutoModelForMaskedLM", DEEP),
    ("gemma3_text", 3, {"target": 0.6, "gates": ["depth"]}, "AutoModelForCausalLM", DEEP),
    ("roberta", 3, {"target": 0.5, "gates": HYBRID}, "AutoModelForMaskedLM", {}),
    ("qwen3", 2, {"target": 0.6, "gates": ["hidden"]}, "AutoModelForCausalLM", {"tie_word_embeddings": True}),
    ("gemma3_text", 3, {"target": 0.6, "gates": ["hidden"]}, "AutoModelForCausalLM", {}),
    ("opt", 2, {"target": 0.3, "gates": [*HYBRID, "depth"], "rule": "movement"}, "AutoModelForCausalLM", DEEP),
]


def prune_all(folder: Path) -> list[dict[str, Any]]:
    """Every case of WHOLE, one after the other."""
    return [
        prune(kind, folder / str(number), stage, leap, settings, head)
        for number, (kind, stage, leap, head, settings) in enumerate(WHOLE)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_layers_and_dimensions_leave_at_the_exact_target_and_stock_models_are_left(
    ranks: RankPools, tmp_path: Path, num_ranks: int
) -> None:
    import transformers

    results = ranks(num_ranks).run(prune_all, tmp_path)
    for number, ((kind, _, leap, head, _), *certificates) in enumerate(zip(WHOLE, *results, strict=True)):
        first = certificates[0]
        assert len({certificate["masks_sha256"] for certificate in certificates}) == 1
        assert abs(first["kept"] - leap["target"] * first["prunable"]) <= first["unit"]
        model, logits, kept = shrunk_logits(tmp_path / str(number), tmp_path / f"{number}-shrunk")
        assert close(first["logits"], logits), kind
        assert len(kept["stream"]) < 32 if "hidden" in leap["gates"] else "stream" not in kept
        gone = sum(g["units"] - g["kept_units"] for g in first["gates"] if g["granularity"] == "depth")
        assert gone > 0 if "depth" in leap["gates"] else gone == 0
        fewer = 4 - model.config.num_hidden_layers if gone else 0
        assert str(model).count("NoLayer") + fewer == gone, kind
        if len(leap["gates"]) == 1:
            stock = getattr(transformers, head).from_pretrained(tmp_path / f"{number}-shrunk").eval()
            with torch.no_grad():
                assert close(first["logits"], stock(input_ids=torch.arange(3, 15)[None]).logits), kind
