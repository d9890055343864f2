"""LeapCallback in Hugging Face's Trainer, on real engines and ranks."""

from __future__ import annotations

from pathlib import Path
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
    callbacks = arguments.pop("callbacks", None)
    arguments = {"num_train_epochs": 2, **settings, **arguments}
    data = rows(176)
    return Trainer(
        tiny_bert(),
        TrainingArguments(folder, **arguments),
        train_dataset=data[:160],
        eval_dataset=data[160:],
        callbacks=callbacks,
    )


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


def predicted(folder: str) -> list[Any]:
    """What a Trainer predicts after train(), and what the smaller model of its folder does."""
    import torch
    from transformers import AutoModelForSequenceClassification

    import leap_dist
    from leap_dist.models.shrink import shrink_

    with accelerate_left_behind():
        trainer = make_trainer(folder, 2, {"target": 0.5, "gates": ["hidden"]})
        leap_dist.LeapCallback(trainer)
        trainer.train()
        trainer.save_model()
        data = rows(8)
        found = trainer.predict(data).predictions
        trainer.deepspeed.destroy()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    shrink_(model)
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in data])).logits
    return [found.tolist(), logits.tolist(), model.get_input_embeddings().weight.shape[1]]


def test_after_train_a_trainer_computes_as_the_smaller_model(ranks: RankPools, tmp_path: Path) -> None:
    found, smaller, width = ranks(1).run(predicted, str(tmp_path))[0]
    assert width < 32
    for one, other in zip(found, smaller, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


PHASES = {"dense": 4, "prune": 8, "settle": 16}  # steps
SECTION = {"target": 0.25, "dense_fraction": 0.25, "settle_fraction": 0.4}


def run(folder: str, stage: int, resume: str | None, **arguments: Any) -> dict[str, Any]:
    """A whole run, or the rest of one: its certificate, rates and losses by step, and the Trainer's best model."""
    import leap_dist

    with accelerate_left_behind():
        trainer = make_trainer(folder, stage, SECTION, logging_steps=1, max_steps=STEPS, **arguments)
        leap = leap_dist.LeapCallback(trainer)
        trainer.train(resume_from_checkpoint=resume)
        state, schedule = trainer.state, trainer.deepspeed.leap.schedule
        assert all(schedule.phase(step) == phase for phase, step in PHASES.items())
        trainer.deepspeed.destroy()
    rates = {row["step"]: (row["learning_rate"], row["loss"]) for row in state.log_history if "loss" in row}
    losses = {row["step"]: row["eval_loss"] for row in state.log_history if "eval_loss" in row}
    best = {"best": state.best_global_step, "folder": state.best_model_checkpoint, "losses": losses}
    return {"certificate": leap.certificate, "rates": rates, **best}


def resumed(folder: str, stage: int, step: int) -> bool:
    """Whether a run that is resumed after a step ends as the one that was not cut off."""
    whole = run(folder, stage, None, save_strategy="steps", save_steps=4)
    return run(folder, stage, f"{folder}/checkpoint-{step}") == whole


@pytest.mark.parametrize(("phase", "stage", "world"), [("dense", 0, 1), ("prune", 3, 2), ("settle", 2, 2)])
def test_a_resumed_trainer_ends_bit_for_bit(
    ranks: RankPools, tmp_path: Path, phase: str, stage: int, world: int
) -> None:
    assert all(ranks(world).run(resumed, str(tmp_path), stage, PHASES[phase], timeout=300))


BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "metric_for_best_model": "loss",
}


def best(folder: str, stage: int) -> dict[str, Any]:
    return run(folder, stage, None, eval_steps=5, save_steps=5, save_total_limit=1, **BEST)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_is_chosen_among_settled_ones(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    from transformers import AutoModelForSequenceClassification

    first, second = ranks(2).run(best, str(tmp_path), stage, timeout=300)
    certificate = first["certificate"]
    assert certificate == second["certificate"] and certificate["density"] == 0.25
    assert sorted(first["losses"]) == [5, 10, 15, 20]
    assert first["best"] == min((15, 20), key=lambda step: first["losses"][step])
    model = AutoModelForSequenceClassification.from_pretrained(first["folder"])
    kept = {name: int(model.get_parameter(name).count_nonzero()) for name in certificate["tensors"]}
    assert kept == {name: t["kept"] - t["zeros_kept"] for name, t in certificate["tensors"].items()}


def too_early(folder: str) -> str:
    with pytest.raises(UserError) as refusal:
        run(folder, 2, None, eval_steps=11, save_steps=11, **BEST)
    return str(refusal.value)


def test_a_best_model_from_before_the_masks_are_frozen_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    message = ranks(1).run(too_early, str(tmp_path))[0]
    assert message.startswith("load_best_model_at_end: got True, but the last evaluation, after step 11, comes before")


def refused(folder: str, section: dict[str, Any] | None) -> str:
    """What LeapCallback says in train()."""
    import leap_dist

    with accelerate_left_behind():
        trainer = make_trainer(folder, 2, section, max_steps=STEPS)
        leap_dist.LeapCallback(trainer)
        try:
            trainer.train()
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, 'leap: the config has no "leap" section'),
        ([0.1], "leap: got [0.1]; allowed: a JSON object"),
        ({"target": 0.1, "total_steps": 30}, "leap.total_steps: got 30; the Trainer takes 20; leave it out"),
    ],
    ids=["no section", "no object", "other length"],
)
def test_what_a_trainer_cannot_do_is_refused(ranks: RankPools, tmp_path: Path, section: Any, message: str) -> None:
    assert message in ranks(1).run(refused, str(tmp_path), section)[0]


def test_a_trainer_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from leap_dist import LeapCallback

    with pytest.raises(UserError, match="trainer: got one without DeepSpeed"):
        LeapCallback(Trainer(tiny_bert(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")))
