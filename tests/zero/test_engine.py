"""LEAP inside real DeepSpeed engines: equal to the oracle for every stage, number of ranks and granularity."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.peers.nets import (
    GATES,
    GLOBAL_BATCH,
    LR,
    WEIGHT_DECAY,
    batches,
    family,
    leap,
    loss_of,
    net,
    plan_of,
    relative_error,
)
from tests.ranks import RankPools

STEPS = 30
WARM_UP = 15


def rate(step: int) -> float:
    """A learning-rate schedule: warm-up and decay."""
    return min((step + 1) / WARM_UP, 1.0) * (1.0 - step / (2 * STEPS))


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def oracle_weights(kind: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    """W * M after all steps, by the oracle, on one process with the whole batch."""
    from leap_dist.core.oracle import Oracle

    model, config = net(kind), leap(kind, STEPS, **changes)
    plan = plan_of(kind, model, config)
    vectors = [name for name, p in model.named_parameters() if p.dim() < 2]
    oracle = Oracle(model, plan, config, LR, WEIGHT_DECAY, no_decay=vectors, max_norm=1.0, seed=17)
    for step, (x, y) in enumerate(batches(STEPS)):
        oracle.scale_rates(rate(step))
        oracle.step(lambda forward, x=x, y=y: loss_of(forward(x), y))
    return {name: w.detach() for name, w in oracle.masked_weights().items()}


def engine_config(stage: int, accumulation: int, world: int, section: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A DeepSpeed config with a leap section."""
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (accumulation * world),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "train": {"learning_rate": LR, "weight_decay": WEIGHT_DECAY},
        "leap": section,
        "steps_per_print": 10**9,
        **more,
    }


def run_steps(engine: Any, accumulation: int, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
    """Optimizer steps first .. last - 1 on this rank's part of the batches."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    size = GLOBAL_BATCH // (accumulation * world)
    for x, y in batches(STEPS)[first:last]:
        for part in range(accumulation):
            start = (part * world + rank) * size
            engine.backward(loss_of(engine(x[start : start + size].to(dtype)), y[start : start + size]))
            engine.step()


def pruned_engine(kind: str, stage: int, accumulation: int, changes: dict[str, Any], **more: Any) -> Any:
    """An engine on the test net, before its first step."""
    import leap_dist

    section = leap(kind, STEPS, **changes).model_dump(mode="json")
    more |= {"family": family(kind)} if family(kind) else {}
    config = engine_config(stage, accumulation, torch.distributed.get_world_size(), section, **more)
    engine, *_ = leap_dist.initialize(model=net(kind), config=config, lr_scheduler=schedule)
    return engine


def final_weights(
    kind: str, stage: int, accumulation: int, changes: dict[str, Any], **more: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and certificate of a whole run."""
    import leap_dist
    from leap_dist.zero.engine import gather_weights

    engine = pruned_engine(kind, stage, accumulation, changes, **more)
    bf16 = "bf16" in more
    run_steps(engine, accumulation, 0, STEPS, torch.bfloat16 if bf16 else torch.float32)
    certificate = leap_dist.finalize(engine)
    weights = dict(gather_weights(engine))
    engine.destroy()
    return weights, certificate


@pytest.fixture(scope="module")
def expected() -> Callable[..., dict[str, Tensor]]:
    """The oracle's weights, computed once a case."""
    known: dict[str, dict[str, Tensor]] = {}

    def weights(kind: str, changes: dict[str, Any]) -> dict[str, Tensor]:
        key = f"{kind} {changes}"
        if key not in known:
            known[key] = oracle_weights(kind, changes)
        return known[key]

    return weights


def compare(results: list[tuple[dict[str, Tensor], dict[str, Any]]], expected: dict[str, Tensor]) -> float:
    """All ranks agree, the certificate is exact; the largest relative error of a tensor."""
    for weights, certificate in results[1:]:
        assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)
        assert certificate["masks_sha256"] == results[0][1]["masks_sha256"]
    weights, certificate = results[0]
    assert set(weights) == set(expected)
    assert abs(certificate["kept"] - certificate["target"] * certificate["prunable"]) <= certificate["unit"]
    assert 0 < certificate["density"] < 0.55
    return max(relative_error(weights[name], expected[name]) for name in expected)


# Every kind on stage 3 and one other, every stage on 1 to 3 ranks; tests/bench/equivalence.py runs all combinations.
GRID = [
    (stage, 1 + (stage + number + number // 3) % 3, kind)
    for number, kind in enumerate(GATES)
    for stage in (number % 3, 3)
]


@pytest.mark.parametrize(("stage", "world", "kind"), GRID)
def test_equals_the_oracle(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], stage: int, world: int, kind: str
) -> None:
    accumulation = 3 if stage in (1, 2) else 1
    results = ranks(world).run(final_weights, kind, stage, accumulation, {})
    assert compare(results, expected(kind, {})) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"control": "paper"},
        {"rule": "movement"},
        {"rule": "magnitude"},
        {"score_init": "zero"},
        {"score_init": "activation"},
        {"score_init": "gradient"},
        {"weights": "frozen"},
    ],
    ids=["paper", "movement", "magnitude", "zero", "activation", "gradient", "frozen"],
)
@pytest.mark.parametrize("kind", ["element", "row"])
def test_other_rules_equal_the_oracle_on_shards(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], kind: str, changes: dict[str, Any]
) -> None:
    results = ranks(2).run(final_weights, kind, 3, 1, changes)
    assert compare(results, expected(kind, changes)) <= 1e-5


@pytest.mark.parametrize(("stage", "kind"), [(0, "hybrid"), (1, "element"), (2, "2:4"), (3, "hybrid")])
def test_moments_of_their_own_equal_the_oracle_under_every_stage(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], stage: int, kind: str
) -> None:
    changes = {"score_moments": "own"}
    results = ranks(2).run(final_weights, kind, stage, 3 if stage in (1, 2) else 1, changes)
    assert compare(results, expected(kind, changes)) <= 1e-5


@pytest.mark.parametrize("start", ["activation", "gradient"])
@pytest.mark.parametrize(("stage", "kind"), [(0, "hybrid"), (1, "head+neuron"), (2, "2:4"), (3, "element")])
def test_scores_from_inputs_equal_the_oracle_under_every_stage(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], stage: int, kind: str, start: str
) -> None:
    # 0.15: at 0.1 a count of the hybrid stands at the edge of a whole number, and rounding on ranks decides
    changes = {"score_init": start, "dense_fraction": 0.15, "tokens_per_step": 1}
    results = ranks(2).run(final_weights, kind, stage, 3 if stage else 1, changes)
    assert compare(results, expected(kind, changes)) <= 1e-5


def offloaded(stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    return final_weights("element", stage, 1, {}, zero_optimization=zero)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_equals_the_oracle(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], stage: int
) -> None:
    assert compare(ranks(2).run(offloaded, stage), expected("element", {})) <= 1e-5


class Checkpointed(nn.Module):
    """The test net with its activations recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.net, x, use_reentrant=False)
        return hidden


def recomputed(stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import leap_dist
    from leap_dist.zero.engine import gather_weights

    section = {**leap("element", STEPS).model_dump(mode="json"), "exclude": ["net.9.weight"]}
    config = engine_config(stage, 1, torch.distributed.get_world_size(), section)
    engine, *_ = leap_dist.initialize(model=Checkpointed(), config=config, lr_scheduler=schedule)
    assert engine.leap.plan.prunable == 13 * 37 + 37 * 29 + 29 * 2 + 2
    run_steps(engine, 1, 0, STEPS)
    certificate = leap_dist.finalize(engine)
    return {name.removeprefix("net."): weight for name, weight in gather_weights(engine)}, certificate


@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing_changes_nothing(
    ranks: RankPools, expected: Callable[..., dict[str, Tensor]], stage: int
) -> None:
    assert compare(ranks(2).run(recomputed, stage), expected("element", {})) <= 1e-5


def bf16_run(stage: int, accumulate: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    types = {"grad_accum_dtype": accumulate}
    return final_weights("element", stage, 1, {}, bf16={"enabled": True}, data_types=types)


@pytest.mark.parametrize(("stage", "accumulate"), [(1, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_bf16_prunes_the_same_up_to_rounding(ranks: RankPools, stage: int, accumulate: str) -> None:
    """Gradients are rounded to bf16 before they are summed over ranks, so masks differ where scores nearly tie."""
    (alone, _), (shared, certificate) = (ranks(world).run(bf16_run, stage, accumulate)[0] for world in (1, 2))
    gated = list(certificate["tensors"])
    kept = torch.cat([(alone[name] != 0).flatten() for name in gated])
    other = torch.cat([(shared[name] != 0).flatten() for name in gated])
    assert shared[gated[0]].dtype == torch.bfloat16
    overlap = (kept & other).sum() / (kept | other).sum()
    assert overlap >= 0.8, f"masks overlap {overlap:.3f}"


def plain_weights(stage: int) -> dict[str, Tensor]:
    """Plain AdamW under a plain engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = net()
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY)
    config = engine_config(stage, 1, torch.distributed.get_world_size(), {})
    config = {key: value for key, value in config.items() if key not in ("leap", "train")}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, lr_scheduler=schedule)
    run_steps(engine, 1, 0, STEPS)
    full = (lambda p: p.detach().clone()) if stage == 0 else safe_get_full_fp32_param
    return {name: full(p) for name, p in engine.module.named_parameters()}


def target_one(stage: int) -> dict[str, Tensor]:
    return final_weights("element", stage, 1, {"target": 1.0})[0]


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_target_one_is_plain_adamw_under_the_same_engine(ranks: RankPools, stage: int, world: int) -> None:
    """Bit for bit where one rank computes all; over ranks, gradient buckets are cut at other places, so sums of
    three and more numbers may round differently."""
    ours, theirs = ranks(world).run(target_one, stage)[0], ranks(world).run(plain_weights, stage)[0]
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


class Tagger(nn.Module):
    """A model that is not from transformers, with a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.embed.weight.requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.body(self.embed(tokens)))
        return hidden


def ten_lines(stage: int) -> dict[str, Any]:
    import leap_dist

    torch.manual_seed(0)
    model = Tagger()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "leap": {"target": 0.25, "total_steps": 40},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, _, _, _ = leap_dist.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(40):
        tokens = torch.randint(0, 50, (8, 5))
        loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1), (tokens % 4).flatten())
        engine.backward(loss)
        engine.step()
    return leap_dist.finalize(engine)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2), (3, 2)])
def test_a_plain_loop_on_any_model(ranks: RankPools, stage: int, world: int) -> None:
    certificate = ranks(world).run(ten_lines, stage)[0]
    assert (certificate["kept"], certificate["prunable"]) == (384, 1536)
    assert set(certificate["tensors"]) == {"body.0.weight", "body.2.weight"}
    assert certificate["density"] == certificate["target"] == 0.25


def early_finalize() -> dict[str, Any]:
    """finalize in the middle of the prune phase settles first, and the hosted weights follow."""
    import leap_dist

    engine = pruned_engine("hybrid", 2, 1, {})
    run_steps(engine, 1, 0, 12)
    assert engine.leap.phase == "prune" and not engine.leap.settled
    certificate = leap_dist.finalize(engine)
    hosted = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    zeros = sum(int((hosted[name] == 0).sum()) for name in certificate["tensors"])
    numel = sum(t["numel"] for t in certificate["tensors"].values())
    kept = sum(t["kept"] for t in certificate["tensors"].values())
    return {**certificate, "hosted_kept": numel - zeros, "masked_kept": kept}


@pytest.mark.quick
def test_finalize_settles_a_run_that_was_cut_short(ranks: RankPools) -> None:
    certificate = ranks(2).run(early_finalize)[0]
    assert abs(certificate["kept"] - 0.2 * certificate["prunable"]) <= certificate["unit"]
    assert certificate["hosted_kept"] == certificate["masked_kept"]
