"""What each expert's matrices are multiplied with is seen inside the one module that computes them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoConfig, AutoModelForCausalLM

import leap_dist
from leap_dist.config.job_file import parse_leap
from leap_dist.models.inputs import resolve_start
from leap_dist.models.plan import make_plan
from leap_dist.zero.products import sums_of_groups
from tests.ranks import RankPools
from tests.zero.test_listener import IDS, MASK, listening, squares

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 8},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 24},  # (inputs, outputs) in memory, biases
    "llama4_text": {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 24},  # all experts at once
}
EXPERTS = ["re:.*experts.(gate_up|down)_proj$"]


def tiny(kind: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | KINDS[kind], intermediate_size_mlp=24, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind != "llama4_text":
        model.set_experts_implementation(implementation)
    return model.train()


def matrices(module: Any) -> tuple[Tensor, Tensor]:
    """Both products' matrices, (experts, outputs, inputs)."""
    transposed = module.gate_up_proj.shape[1] == module.down_proj.shape[2]
    both = (module.gate_up_proj.detach().clone(), module.down_proj.detach().clone())  # products with these do not count
    return tuple(weight.transpose(1, 2) if transposed else weight for weight in both)  # type: ignore[return-value]


def given(model: Any, calls: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """The inputs' sums of squares over calls with (ids, mask), (experts * inputs,) by name, expert by expert."""
    found: dict[str, Tensor] = {}
    real: list[Tensor] = []  # of the call at hand: which tokens are no padding

    def see(path: str, module: Any, args: tuple[Tensor, ...]) -> None:
        first = matrices(module)[0]
        pieces: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(len(first)):
            if len(args) == 1:  # llama4: every expert has a row for every token, of zeros where it is not chosen
                rows = args[0].view(len(first), -1, first.shape[-1])[expert]
            else:
                rows = args[0][(args[1] == expert).any(-1) & real[-1]]
            hidden = activated(module, rows.detach() @ first[expert].T, expert)
            pieces["gate_up_proj"].append(rows.detach().double().square().sum(0))
            pieces["down_proj"].append(hidden.double().square().sum(0))
        for name, sums in pieces.items():
            found[f"{path}.{name}"] = found.get(f"{path}.{name}", 0.0) + torch.cat(sums)

    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: see(path, m, args))
        for path, module in model.named_modules()
        if "Experts" in type(module).__name__
    ]
    for ids, mask in calls:
        real.append((torch.ones_like(ids) if mask is None else mask).flatten().bool())
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    for name, sums in found.items():
        own = sums.view(len(model.get_parameter(name)), -1)
        own[~own.any(1)] = 1e-12 * own[own.any(1)].mean(0)  # of an expert that no token reached
    return found


def activated(module: Any, product: Tensor, expert: int) -> Tensor:
    """What the second product is given, from the first."""
    if hasattr(module, "gate_up_proj_bias"):
        product = product + module.gate_up_proj_bias[expert].detach()
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(product)  # type: ignore[no-any-return]
    gate, up = product.chunk(2, dim=-1)
    return up * module.act_fn(gate)  # type: ignore[no-any-return]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, sums in found.items():
        torch.testing.assert_close(sums, expected[name], rtol=1e-5, atol=1e-20, msg=name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("qwen3_moe", "eager"), ("qwen3_moe", "grouped_mm"), ("gpt_oss", "eager"), ("gpt_oss", "grouped_mm")],
)
def test_each_expert_has_the_inputs_of_its_own_tokens(kind: str, implementation: str, padded: bool) -> None:
    model, mask = tiny(kind, implementation), MASK if padded else None
    inputs = listening(model, include=EXPERTS)
    expected = given(model, [(IDS, mask)])
    same(squares(inputs), expected)


def test_experts_that_are_multiplied_all_at_once_have_theirs() -> None:
    model = tiny("llama4_text")
    inputs = listening(model, include=EXPERTS)
    expected = given(model, [(IDS, None)])
    same(squares(inputs), expected)


def test_experts_that_no_token_reached_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("qwen3_moe")
    inputs = listening(model, include=EXPERTS)
    expected = given(model, [(IDS[:1, :1], None)])  # one token, two experts of five in both layers
    same(squares(inputs), expected)
    assert "no token reached 12 of 20 experts' matrices: whole units of them are the first to leave, " in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_and_an_evaluation_do_not_count(reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    inputs = listening(model, include=EXPERTS)
    expected = given(model, [(IDS, MASK)])
    squares(inputs)
    inputs.flat.zero_()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    model.eval()(IDS)
    same(squares(inputs), expected)


def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_moe")
    inputs = listening(model, include=EXPERTS)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1].mlp.experts.act_fn, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(IDS)
    assert not _get_current_function_mode_stack()
    inputs.pool()
    inputs.flat.zero_()
    expected = given(model, [(IDS, None)])
    same(squares(inputs), expected)


@pytest.mark.parametrize(
    ("implementation", "changes", "start", "why"),
    [
        ("grouped_mm", {}, "gradient", "weights and masks are trained"),
        ("eager", {"mode": "one_shot"}, "activation", "there are no gradients"),
        ("batched_mm", {}, "magnitude", "no module shows the inputs of model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_what_scores_start_from(implementation: str, changes: dict[str, Any], start: str, why: str) -> None:
    config = parse_leap({"target": 0.5, **changes})
    model = tiny("qwen3_moe", implementation)
    found = resolve_start(model, make_plan(model, config), config)
    assert found.config.score_init == start and found.why.startswith(why)


@pytest.mark.parametrize("chunk", [3, 8192])
def test_groups_may_be_empty_and_rows_in_none(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("leap_dist.zero.products.CHUNK", chunk)
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    found = sums_of_groups(x, torch.tensor([0, 4, 4, 9], dtype=torch.int32))
    rows = x.double().square()
    zeros = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([zeros, rows[:4].sum(0), zeros, rows[4:9].sum(0)]), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- under ZeRO


def pruned(kind: str, gate: str, stage: int) -> dict[str, Tensor]:
    """The masks of experts that are cut at once."""
    from leap_dist.zero.engine import gather_masks

    leap = {"target": 0.5, "mode": "one_shot", "calibration_batches": 2, "gates": [gate], "include": EXPERTS}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "leap": leap}
    engine, *_ = leap_dist.initialize(model=tiny(kind), config=config)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = [{"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1]} for row in range(2)]
    assert leap_dist.calibrate(engine, batches[rank::world]) == 2
    leap_dist.finalize(engine)
    masks = dict(gather_masks(engine))
    engine.destroy()
    return masks


def under_every_stage(kind: str, gate: str) -> list[dict[str, Tensor]]:
    return [pruned(kind, gate, stage) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "gate", "world"), [("qwen3_moe", "element", 1), ("qwen3_moe", "2:4", 2), ("gpt_oss", "element", 2)]
)
def test_masks_are_those_of_plain_torch_on_any_ranks_and_stage(
    ranks: RankPools, kind: str, gate: str, world: int
) -> None:
    model = tiny(kind).eval()
    sums = given(model, [(IDS[:1], MASK[:1]), (IDS[1:], MASK[1:])])
    for found in ranks(world).run(under_every_stage, kind, gate):
        for masks in found:
            assert masks.keys() == sums.keys()
            for name, mask in masks.items():
                path, _, local = name.rpartition(".")
                weight = matrices(model.get_submodule(path))[local == "down_proj"]
                sizes = weight.abs() * sums[name].sqrt().float().view(len(weight), 1, -1)
                kept = mask.transpose(1, 2) if kind == "gpt_oss" else mask
                if gate == "2:4":
                    best = sizes.view(-1, 4).topk(2).indices
                    expected = torch.zeros(len(best), 4, dtype=torch.bool).scatter_(1, best, True).view_as(sizes)
                else:
                    sizes = sizes / sizes.mean(-1, dtype=torch.float64, keepdim=True).float()
                    expected = torch.zeros_like(kept).flatten()
                    expected[sizes.flatten().topk(int(kept.sum())).indices] = True
                    expected = expected.view_as(kept)
                assert torch.equal(kept.bool(), expected.bool()), name
