"""LeapCallback in Hugging Face's Trainer, on real engines and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leap_dist.errors import UserError
from tests.ecosystem.tiny import LEARNING_RATE, accelerate_left_behind, rows, tiny_bert
from tests.ranks import RankPools

STEPS = 20
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}


def make_trainer(folder: str, stage: int, section: dict[str, Any] | None, **arguments: Any) -> Any:
    """A Trainer of STEPS steps, with a schedule and weight decay of its own."""
    from transformers import Trainer, TrainingArguments

    zero = {"stage": stage, "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True}
    config = {**AUTO, "zero_optimization": zero} | ({"leap": section} if section is not None else {})
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.1,
        "deepspeed": config,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = {"num_train_epochs": 2, **settings, **arguments}
    return Trainer(model=tiny_bert(), args=TrainingArguments(folder, **arguments), train_dataset=rows(160))


def train(folder: str, stage: int) -> dict[str, Any]:
    """A whole run; what a user has at the end of it."""
    import leap_dist

    with accelerate_left_behind():
        trainer = make_trainer(folder, stage, {"target": 0.25})
        leap = leap_dist.LeapCallback(trainer)
        trainer.train()
        trainer.save_model()
        optimizer = trainer.deepspeed.leap
        names = [name for name, _ in trainer.model.named_parameters()]
        decay = {group["weight_decay"] for group in optimizer.param_groups}
        trainer.deepspeed.destroy()
    assert leap.certificate is not None
    taken = {"steps": optimizer.num_steps, "total": optimizer.schedule.total_steps, "decay": sorted(decay)}
    return {**leap.certificate, **taken, "names": names, "rate": optimizer.param_groups[0]["base_lr"]}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_reaches_the_exact_target(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    from transformers import AutoModelForSequenceClassification

    first, second = ranks(2).run(train, str(tmp_path), stage)
    assert first == second
    assert (first["kept"], first["prunable"]) == (4096, 16384)
    assert first["steps"] == first["total"] == STEPS
    assert first["rate"] == LEARNING_RATE and first["decay"] == [0.0, 0.1]
    assert not any(name.startswith("leap.") for name in first["names"])
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    found = {name: int(model.get_parameter(name).count_nonzero()) for name in first["tensors"]}
    assert found == {name: tensor["kept"] - tensor["zeros_kept"] for name, tensor in first["tensors"].items()}


def refused(folder: str, section: dict[str, Any] | None, steps_done: int) -> str:
    """What LeapCallback says in train()."""
    import leap_dist

    with accelerate_left_behind():
        trainer = make_trainer(folder, 2, section, max_steps=STEPS)
        leap_dist.LeapCallback(trainer)
        if steps_done:
            state = {"global_step": steps_done, "max_steps": STEPS, "train_batch_size": 4}
            (Path(folder) / "trainer_state.json").write_text(json.dumps(state), "utf-8")
        try:
            trainer.train(resume_from_checkpoint=folder if steps_done else None)
        except UserError as error:
            assert not hasattr(trainer.model, "leap")
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("section", "steps_done", "message"),
    [
        (None, 0, 'leap: the config has no "leap" section'),
        ([0.1], 0, "leap: got [0.1]; allowed: a JSON object"),
        ({"target": 0.1, "total_steps": 30}, 0, "leap.total_steps: got 30; the Trainer takes 20; leave it out"),
        ({"target": 0.1}, 5, "resume_from_checkpoint: a Trainer's checkpoints do not hold what LEAP needs"),
    ],
    ids=["no section", "no object", "other length", "resumed"],
)
def test_what_a_trainer_cannot_do_is_refused(
    ranks: RankPools, tmp_path: Path, section: Any, steps_done: int, message: str
) -> None:
    assert message in ranks(1).run(refused, str(tmp_path), section, steps_done)[0]


def stand_in(plugin: Any, best: bool) -> Any:
    """What LeapCallback looks at before it touches a Trainer."""
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(accelerator=SimpleNamespace(state=state), args=SimpleNamespace(load_best_model_at_end=best))


def test_a_trainer_that_does_not_fit_is_refused_at_once() -> None:
    from leap_dist import LeapCallback

    with pytest.raises(UserError, match="trainer: got one without DeepSpeed"):
        LeapCallback(stand_in(None, False))
    with pytest.raises(UserError, match="load_best_model_at_end: got True; allowed: False"):
        LeapCallback(stand_in(object(), True))
