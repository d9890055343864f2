"""host and attach: an engine that Accelerate builds trains as one from leap_dist.initialize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leap_dist.errors import UserError
from tests.ecosystem.tiny import LEARNING_RATE, accelerate_left_behind, rows, tiny_bert
from tests.ranks import RankPools

STEPS = 15
SAVED = 8
BATCH = 4  # rows of a rank
LEAP = {"target": 0.25, "total_steps": STEPS}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def decaying(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def batches() -> list[dict[str, torch.Tensor]]:
    """This rank's batches."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = rows(STEPS * BATCH * world)
    cut = [data[start : start + BATCH] for start in range(0, len(data), BATCH)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in cut[rank::world]]


def by_accelerate(stage: int, folder: str, load: bool = False) -> str:
    """The weights' hash of a run whose engine Accelerate builds, with its own schedule outside of the engine.

    Its state is saved in the prune phase; or loaded there, and the run is the rest.
    """
    from accelerate import Accelerator, DeepSpeedPlugin

    import leap_dist

    with accelerate_left_behind():
        config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": "auto"}
        config |= {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "leap": LEAP}
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = tiny_bert()
        optimizer = leap_dist.host(model, adamw(model), config)
        model, optimizer = accelerator.prepare(model, optimizer)
        leap_dist.attach(model)
        scheduler = decaying(optimizer)
        accelerator.register_for_checkpointing(scheduler)
        if load:
            accelerator.load_state(folder)
        for step, batch in enumerate(batches()):
            if step < SAVED and load:
                continue
            if step == SAVED and not load:
                assert model.leap.phase == "prune"
                accelerator.save_state(folder)
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        certificate = leap_dist.finalize(model)
        leap_dist.release(model.module)
        model.destroy()
    assert (certificate["kept"], certificate["prunable"]) == (4096, 16384)
    return str(certificate["weights_sha256"])


def by_initialize(stage: int) -> str:
    """The same run in a DeepSpeed loop."""
    import leap_dist

    model = tiny_bert()
    config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 1.0, "leap": LEAP}
    config |= {"zero_optimization": {"stage": stage}}
    engine, *_ = leap_dist.initialize(model=model, optimizer=adamw(model), config=config, lr_scheduler=decaying)
    for batch in batches():
        engine.backward(engine(**batch).loss)
        engine.step()
    certificate = leap_dist.finalize(engine)
    engine.destroy()
    return str(certificate["weights_sha256"])


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_trains_and_resumes_bit_for_bit_as_initialize(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ours = ranks(2).run(by_initialize, stage, timeout=300)
    assert ranks(2).run(by_accelerate, stage, str(tmp_path), timeout=300) == ours and ours[0] == ours[1]
    assert ranks(2).run(by_accelerate, stage, str(tmp_path), True, timeout=300) == ours


def accumulated(folder: str) -> tuple[list[str], dict[str, Any] | None, int]:
    """What our checkpoints say after each micro-batch of two steps of two; of a resumed run its step."""
    from accelerate import Accelerator, DeepSpeedPlugin

    import leap_dist

    said: list[str] = []
    checkpoints = leap_dist.Checkpoints(folder)
    with accelerate_left_behind():
        config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 2}
        config |= {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}, "leap": LEAP}
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        for resumed in (False, True):
            model = tiny_bert()
            model, optimizer = accelerator.prepare(model, leap_dist.host(model, adamw(model), config))
            leap_dist.attach(model)
            if resumed:
                return said, checkpoints.load(model), model.leap.num_steps
            for batch in batches()[:4]:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                try:
                    checkpoints.save(model, {"step": model.leap.num_steps})
                    checkpoints.wait()
                    said.append("")
                except UserError as error:
                    said.append(str(error))
    raise AssertionError


def test_checkpoints_are_taken_between_the_steps_that_accelerate_ends(ranks: RankPools, tmp_path: Path) -> None:
    """It says of each micro-batch whether it is the last one, and DeepSpeed counts steps alone."""
    said, progress, step = ranks(1).run(accumulated, str(tmp_path), timeout=300)[0]
    within = "engine: it is in the middle of a step, after some of its micro-batches; save and load between optimizer"
    assert [text[: len(within)] for text in said] == [within, "", within, ""]
    assert (progress, step) == ({"step": 2}, 2)


def attached(kind: str) -> str:
    """What attach says of an engine that it cannot take."""
    import deepspeed

    import leap_dist

    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "leap": LEAP}
    config["zero_optimization"] = {"stage": 3, "sub_group_size": 100 if kind == "small sub-groups" else 10**9}
    optimizer: Any = adamw(model)
    if kind != "another optimizer":
        optimizer = leap_dist.host(model, optimizer, config)
    engine: Any = model
    if kind != "no engine":
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        leap_dist.attach(engine)
        leap_dist.attach(engine)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no engine", "engine: got a Sequential that steps with NoneType; allowed: the DeepSpeed engine with the "),
        ("another optimizer", "engine: got a DeepSpeedEngine that steps with AdamW; allowed: the DeepSpeed engine "),
        ("another engine", "engine: the optimizer of leap_dist.host that it steps with has an engine already; one "),
        ("small sub-groups", "zero_optimization.sub_group_size: got 100; the gated weights have to be in one "),
    ],
)
def test_attach_refuses_what_it_cannot_show_a_whole_gate_in(ranks: RankPools, kind: str, message: str) -> None:
    assert ranks(1).run(attached, kind)[0].startswith(message)


def test_an_offloaded_optimizer_must_not_be_replaced() -> None:
    import leap_dist

    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}
    config = {"gradient_clipping": "auto", "zero_optimization": zero, "leap": LEAP}
    with pytest.raises(UserError, match="zero_force_ds_cpu_optimizer: has to be false where the optimizer is off"):
        leap_dist.host(model, adamw(model), config)
    optimizer = leap_dist.host(model, adamw(model), config | {"zero_force_ds_cpu_optimizer": False})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
