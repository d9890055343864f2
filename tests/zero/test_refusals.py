"""What cannot work is refused before anything is built, every reason in one error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leap_dist
from leap_dist.errors import UserError
from leap_dist.zero.refusals import OTHER_SHARDING, check_engine_config
from tests.ranks import RankPools

BATCH = {"train_micro_batch_size_per_gpu": 4}


def check(
    config: dict[str, Any],
    model: nn.Module | None = None,
    mpu: Any = None,
    lr_scheduler: Any = None,
    optimizer: Any = None,
    mesh_param: Any = None,
) -> None:
    check_engine_config(BATCH | config, model or nn.Linear(2, 3), mpu, mesh_param, lr_scheduler, optimizer)


def test_a_device_mesh_is_refused() -> None:
    with pytest.raises(UserError, match="mesh_param: device meshes are not supported"):
        check({}, mesh_param=(1, 1))


def adamw(**settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(nn.Linear(2, 3).parameters(), **settings)


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "fp16": {"enabled": True}},
        {"zero_optimization": {"stage": 3, **OTHER_SHARDING}},
        {"bf16": {"enabled": False}, "hybrid_engine": {"enabled": False}, "tensor_parallel": {"enabled": False}},
        {"sequence_parallel_size": 1, "leap": {"target": 0.5}},
        {"zero_optimization": {"elastic_checkpoint": False}, "checkpoint": {"load_universal": False}},
    ],
)
def test_what_works_passes(config: dict[str, Any]) -> None:
    check(config, lr_scheduler=schedule, optimizer=adamw())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, r"optimizer: LEAP's step is the optimizer \(AdamW\); remove the section"),
        ({"zero_optimization": {"stage": 5}}, r"zero_optimization\.stage: got 5; allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage: got True; allowed"),
        ({"zero_optimization": {"stage": "2"}}, r"zero_optimization\.stage: got '2'; allowed"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}},
            r"bf16\.bf16_master_weights_and_grads: got True; allowed: False: scores and thresholds need fp32 masters",
        ),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 3}},
            r"bf16\.bf16_optimizer_states: got True; allowed: False: scores and thresholds need fp32 moments",
        ),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 1}},
            r"bf16\.check_grad_overflow: got False; allowed: True: a gradient that is not finite would spoil every",
        ),
        ({"zero_optimization": True}, r'zero_optimization: got True; allowed: an object, such as {"stage": 2}'),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": 0},
            r"zero_optimization\.compute_grad_norm: got False; allowed: True: without the norm a gradient that is not",
        ),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled: zero_optimization\.stage 0 hides its fp32 master weights"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled: zero_optimization\.stage 0 hides its fp32 master weights"),
        ({"amp": {"enabled": True}}, r"amp\.enabled: LEAP's step works with bf16 or fp16 under ZeRO stage 1, 2 or 3"),
        (
            {"amp": {"enabled": True}, "zero_optimization": {"stage": 2}},
            r"amp\.enabled: LEAP's step works with bf16 or fp16 under ZeRO",
        ),
        (
            {"amp": {"enabled": True}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            r"amp\.enabled: LEAP's step works with bf16 or fp16 under ZeRO",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"zero_optimization\.offload_optimizer\.device: got 'nvme'; the state has to stay in memory",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"zero_optimization\.offload_param\.device: got 'nvme'; the state has to stay in memory",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"zero_optimization\.offload_optimizer\.ratio: the state has to be in one place; use 1\.0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": "half"}}},
            r"zero_optimization\.offload_optimizer\.ratio: the state has to be in one place",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel: not supported together with LEAP yet; remove"),
        ({"expert_parallel": {"enabled": True}}, r"expert_parallel: not supported together with LEAP yet"),
        ({"hybrid_engine": {"enabled": True}}, r"hybrid_engine: not supported together with LEAP yet"),
        ({"compression_training": {}}, r"compression_training: what DeepSpeed pruned by; .* --import-compression FILE"),
        ({"gradient_clipping": "one"}, r"gradient_clipping: got 'one'; allowed: a number >= 0"),
        ({"gradient_clipping": -1}, r"gradient_clipping: got -1; allowed: a number >= 0"),
        ({"gradient_clipping": True}, r"gradient_clipping: got True; allowed: a number >= 0"),
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
            r"zero_optimization\.elastic_checkpoint: such checkpoints hold no progress of LEAP; remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}},
            r"zero_optimization\.load_from_fp32_weights: got False; LEAP resumes from the fp32 weights: remove it",
        ),
        (
            {"checkpoint": {"load_universal": True}},
            r"checkpoint\.load_universal: universal checkpoints hold no latent weights, scores and masks; remove it",
        ),
        ({"sequence_parallel_size": 2}, r"sequence_parallel_size: not supported together with LEAP yet; use 1"),
    ],
)
def test_refused_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zenflow", {"topk_ratio": 0.1}),
        ("mics_shard_size", 2),
        ("zero_hpz_partition_size", 2),
        ("zero_quantized_weights", True),
    ],
)
def test_refused_way_of_sharding(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^zero_optimization\.{key}: LEAP does not know this way of sharding yet"):
        check({"zero_optimization": {"stage": 3, key: value}})


def test_every_other_way_of_sharding_is_covered() -> None:
    assert list(OTHER_SHARDING) == ["zenflow", "mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights"]


class PipelineModule(nn.Linear):
    """Of the name of DeepSpeed's."""


def expert_model() -> nn.Module:
    model = nn.Linear(2, 3)
    vars(model.weight)["allreduce"] = False  # as DeepSpeed marks expert parameters
    return model


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"mpu": object()}, r"mpu: tensor and pipeline parallel groups are not supported yet"),
        ({"model": PipelineModule(2, 3)}, r"model: pipeline modules are not supported yet"),
        ({"model": expert_model()}, r"model: expert parallel parameters are not supported yet"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 3).parameters())},
            r"optimizer: got a SGD; LEAP steps as AdamW: pass a torch\.optim\.AdamW",
        ),
        (
            {"optimizer": torch.optim.Adam(nn.Linear(2, 3).parameters())},
            r"optimizer: got a Adam; LEAP steps as AdamW",
        ),
        ({"optimizer": adamw(amsgrad=True)}, r"optimizer: amsgrad is not supported"),
        (
            {"lr_scheduler": schedule(adamw())},
            r"lr_scheduler: got a scheduler that is tied to another optimizer; pass a function that makes it",
        ),
    ],
)
def test_refused_object(objects: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        check({}, **objects)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"leap": ', "not JSON: line 1, column 10"),
        ("[1]", "allowed: a JSON object"),
        ('{"leap": {"target": 0.5}, "leap": {}}', "the same key is given twice: leap"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_a_config_file_of_an_own_loop_is_read_as_a_job_file_is(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        leap_dist.host(nn.Linear(4, 4), None, file)


def test_all_reasons_in_one_error() -> None:
    config = {
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 7, "mics_shard_size": 4, "offload_param": {"device": "nvme"}},
        "sequence_parallel_size": 2,
    }
    with pytest.raises(UserError) as refused:
        check(config, model=expert_model(), mpu=object(), optimizer=adamw(amsgrad=True))
    keys = [line.split(":")[0] for line in str(refused.value).splitlines()]
    assert keys == [
        "optimizer",
        "zero_optimization.stage",
        "zero_optimization.offload_param.device",
        "zero_optimization.mics_shard_size",
        "sequence_parallel_size",
        "mpu",
        "model",
        "optimizer",
    ]


# ------------------------------------------------------------------- what DeepSpeed has against its own part

DEEPSPEED_REFUSES = [
    ({"zero_optimization": {"stge": 2}}, r"^DeepSpeedZeroConfig\.stge: got 2; DeepSpeed says: Extra inputs"),
    ({"bf16": True}, r"^DeepSpeed refuses its part of the config: .*not bool$"),
    (
        {"train_batch_size": 7, "gradient_accumulation_steps": 1},
        r"^DeepSpeed refuses its part of the config: .*train_batch_size .*7 != 4 \* 1 \* 1$",
    ),
    ({"gradient_accumulation_steps": 0}, r"^DeepSpeed refuses its part of the config: "),
]


def refusals_in_a_rank(configs: list[dict[str, Any]]) -> list[str]:
    """What each config is refused with, where DeepSpeed's ranks run."""
    messages = []
    for config in configs:
        try:
            check(config)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_deepspeed_speaks_for_its_own_part(ranks: RankPools) -> None:
    fp16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}, "leap": {"target": 0.5}}
    configs = [config for config, _ in DEEPSPEED_REFUSES]
    *messages, on_cpu, good = ranks(1).run(refusals_in_a_rank, [*configs, fp16, {"zero_optimization": {"stage": 3}}])[0]
    for message, (config, expected) in zip(messages, DEEPSPEED_REFUSES, strict=True):
        assert re.search(expected, message), (config, message)
    assert on_cpu in ("", "fp16.enabled: the cpu of this machine cannot; use bf16 or fp32")
    assert good == ""


def test_batch_sizes_are_judged_by_the_ranks_there_are(ranks: RankPools) -> None:
    config = {"train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert ranks(2).run(refusals_in_a_rank, [config]) == [[""], [""]]
    assert "8 != 4 * 1 * 1" in ranks(1).run(refusals_in_a_rank, [config])[0][0]


@pytest.mark.parametrize(
    ("dtype", "stage", "message"),
    [
        (torch.float64, 0, r"model: weight is torch\.float64; allowed under zero_optimization\.stage 0: float32; call"),
        (
            torch.float64,
            2,
            r"model: weight is torch\.float64; .*stage 2: float32, bfloat16, float16; call model\.float",
        ),
        (torch.bfloat16, 0, r"model: weight is torch\.bfloat16; allowed under zero_optimization\.stage 0: float32"),
        (torch.float16, 0, r"model: weight is torch\.float16; allowed under zero_optimization\.stage 0: float32"),
    ],
)
def test_a_dtype_without_an_fp32_master_is_refused(dtype: torch.dtype, stage: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        check({"zero_optimization": {"stage": stage}}, model=nn.Linear(2, 3, dtype=dtype))
    for section in ("bf16", "fp16"):  # DeepSpeed casts, and keeps masters
        check({"zero_optimization": {"stage": 2}, section: {"enabled": True}}, model=nn.Linear(2, 3, dtype=dtype))


def test_several_dtypes_without_a_section_are_refused() -> None:
    mixed = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, dtype=torch.bfloat16))
    with pytest.raises(
        UserError, match=r"several dtypes: 1\.weight is torch\.bfloat16, 0\.weight is torch\.float32; all"
    ):
        check({"zero_optimization": {"stage": 2}}, model=mixed)
    mixed[1].requires_grad_(False)
    check({"zero_optimization": {"stage": 0}}, model=mixed)


# ------------------------------------------------------------------- what DeepSpeed refuses while it builds

BUILDING = [
    (
        {"scheduler": {"type": "WarmupLR", "params": "auto"}},
        r"^DeepSpeed cannot build the engine: \w+: ",
    ),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup": 3}}}, r"^DeepSpeed .*: TypeError: .*'warmup'"),
    ({"tensorboard": {"enabled": True}}, r"^DeepSpeed .*: ModuleNotFoundError: .*tensorboard"),
    (
        {"prescale_gradients": True, "zero_optimization": {"stage": 3}},
        r"^DeepSpeed .*: AssertionError: pre-scale gradients",
    ),
]


def building(configs: list[dict[str, Any]]) -> list[str]:
    """What initialize says to each config."""
    import leap_dist

    messages = []
    for config in configs:
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        section = {"target": 0.5, "total_steps": 10, "include": ["0.weight"]}
        try:
            leap_dist.initialize(model=model, config=BATCH | config | {"leap": section})
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_deepspeed_refuses_while_it_builds_is_one_message_in_its_own_words(ranks: RankPools) -> None:
    *messages, good = ranks(1).run(building, [*(config for config, _ in BUILDING), {}])[0]
    assert good == ""
    for message, (config, expected) in zip(messages, BUILDING, strict=True):
        assert re.search(expected, message) and "\n" not in message, (config, message)
