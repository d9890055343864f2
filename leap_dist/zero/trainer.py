"""LEAP in Hugging Face's Trainer: TrainingArguments(deepspeed=...) builds the engine, one callback does the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from leap_dist.errors import UserError
from leap_dist.zero.engine import attach, engine_config, finalize, host


class LeapCallback(TrainerCallback):
    """Prunes the model of a Trainer as it trains. Making one is all: it adds itself to the Trainer.

    trainer: a Trainer whose TrainingArguments have a `deepspeed` config with a "leap" section. The optimizer's settings
    come from the arguments, the length of the schedule from the Trainer's steps; "leap.total_steps" may be left out.

    When train() is over the density is exact, `certificate` is what `leap_dist.finalize` returns, and the model is a
    plain one with zeros, for `trainer.save_model`; LEAP's hooks on routers and norms stay, so that `trainer.evaluate`
    computes what was trained. `resume_from_checkpoint` resumes bit for bit; `load_best_model_at_end` chooses among the
    models whose masks are frozen. Raises UserError for what cannot work.
    """

    def __init__(self, trainer: Trainer) -> None:
        if getattr(trainer.accelerator.state, "deepspeed_plugin", None) is None:
            raise UserError(
                "trainer: got one without DeepSpeed; allowed: one with TrainingArguments(deepspeed=...), a config "
                'with a "leap" section'
            )
        self.certificate: dict[str, Any] | None = None
        self._trainer = trainer
        self._theirs = trainer.optimizer_cls_and_kwargs
        factory: Any = lambda: self._make_optimizer  # noqa: E731  # called in train()
        trainer.optimizer_cls_and_kwargs = (factory, {})
        trainer.add_callback(self)

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """LEAP's optimizer with the groups and settings of the one that the Trainer would have made."""
        trainer = self._trainer
        trainer.optimizer_cls_and_kwargs = self._theirs
        plain = trainer.create_optimizer()
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        job = config | {"leap": self._with_length(config.get("leap"))} if "leap" in config else config
        ours = engine_config(config)
        optimizer = host(model, plain, job | ours)
        config.update(ours)  # the engine is built from this very dict
        return optimizer

    def _with_length(self, section: Any) -> Any:
        """The leap section with the number of steps that the Trainer is going to take."""
        steps = self._trainer.state.max_steps
        if not isinstance(section, dict):
            return section
        if section.get("total_steps") not in (None, steps):
            raise UserError(f"leap.total_steps: got {section['total_steps']}; the Trainer takes {steps}; leave it out")
        return section | {"total_steps": steps}

    @property
    def _engine(self) -> Any:
        return self._trainer.deepspeed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine is there, with a checkpoint's state in it if one is resumed; no step has been taken."""
        attach(self._engine)
        if args.load_best_model_at_end:
            self._check_best(args, state)

    def _check_best(self, args: Any, state: Any) -> None:
        """Raise UserError if no model is evaluated after the masks are frozen."""
        last = (
            state.max_steps if args.eval_strategy == "epoch" else state.max_steps // state.eval_steps * state.eval_steps
        )
        if self._engine.leap.schedule.phase(last) != "settle":
            raise UserError(
                f"load_best_model_at_end: got True, but the last evaluation, after step {last}, comes before the masks "
                "are frozen: the best model would not be at the target; give a smaller eval_steps, a larger "
                "leap.settle_fraction, or False"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A model from before the masks were frozen is not the best one: it is not at the target."""
        if not self._engine.leap.settled:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All steps are taken, on every rank, and the best model is loaded if that was asked for."""
        engine = self._engine
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and not engine.leap.settled:
            raise UserError(
                f"load_best_model_at_end: the best model, {state.best_model_checkpoint}, is from before the masks were "
                "frozen; resume from a later checkpoint, with load_best_model_at_end=False"
            )
        self.certificate = finalize(engine)
