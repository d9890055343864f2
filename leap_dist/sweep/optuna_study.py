"""A search by Optuna: settings asked for one after another, with what came of those before.

Optuna looks for the whole front at once, the metric against the density, where targets vary; else for the metric alone.
Its study is a file of the sweep's folder, so that a sweep that was cut off resumes with what it has learned.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.errors import UserError
from leap_dist.files import drop_torn_line
from leap_dist.sweep.grid import MOST_CELLS, Settings, expand, name_of
from leap_dist.sweep.space import SEED, Space, rounded, spaces
from leap_dist.sweep.sweep_file import TARGET, SweepConfig

if TYPE_CHECKING:
    import optuna

STUDY = "optuna.log"
FEWEST = 5  # finished trials of which Optuna is asked what mattered
TRIES = 100  # to find settings that are new and make a valid job


class OptunaStudy:
    """Optuna's study of a sweep. Raises UserError if the study's file is damaged."""

    def __init__(self, sweep: SweepConfig, folder: Path, higher_is_better: bool) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._spaces = spaces(sweep.vary)
        self._failed = optuna.trial.TrialState.FAIL
        self._fronts = TARGET in sweep.vary
        drop_torn_line(folder / STUDY)  # Optuna would write behind it
        num_first = max(4, sweep.samples // 4)  # trials at random, before Optuna chooses
        best: Any = "maximize" if higher_is_better else "minimize"
        try:
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / STUDY))),
                study_name="sweep",
                load_if_exists=True,
                directions=[best, "minimize"] if self._fronts else [best],
                sampler=optuna.samplers.TPESampler(seed=SEED, n_startup_trials=num_first),
            )
            if not self._study.trials and self._fronts and self._spaces[TARGET].kind == "choice":
                targets = itertools.islice(itertools.cycle(self._spaces[TARGET].values), num_first)
                for target in targets:  # at random the first trials could all have one target, and nothing be learned
                    self._study.enqueue_trial({TARGET: json.dumps(target)})
        except Exception as error:  # a damaged file raises of many kinds
            raise UserError(
                f"--output: {folder / STUDY} cannot be read: {error}; restore it, or choose another folder"
            ) from error

    @property
    def num_combinations(self) -> float:
        """Different settings that there are."""
        kinds = self._spaces.values()
        return math.prod(len(space.values) if space.kind == "choice" else math.inf for space in kinds)

    def asked(self) -> list[tuple[str, Settings]]:
        """The trials that were asked for so far."""
        found = [trial for trial in self._study.trials if "settings" in trial.user_attrs]  # or a kill came between
        return [_named(trial.number, trial.user_attrs["settings"]) for trial in found]

    def ask(self, is_job: Callable[[Settings], bool]) -> tuple[str, Settings] | None:
        """The name and the settings of the next trial, new ones that make a job; None if Optuna finds no others."""
        seen = [settings for _, settings in self.asked()]
        for _ in range(TRIES):
            trial = self._study.ask()
            settings = {key: self._suggest(trial, key, space) for key, space in self._spaces.items()}
            if settings not in seen and is_job(settings):
                trial.set_user_attr("settings", settings)
                return _named(trial.number, settings)
            seen.append(settings)
            self._study.tell(trial, state=self._failed)
            self._point_to_another(seen)
        return None

    def _point_to_another(self, seen: Sequence[Settings]) -> None:
        """Of few combinations Optuna likes to name one again: it is given one that is left."""
        if self.num_combinations <= MOST_CELLS:
            choices = {key: space.values for key, space in self._spaces.items()}
            left = [settings for settings in expand(choices) if settings not in seen]
            if left:
                chosen = random.Random(len(seen)).choice(left)
                self._study.enqueue_trial({key: json.dumps(value) for key, value in chosen.items()})

    def tell(self, name: str, value: float | None, density: float) -> None:
        """What came of a trial."""
        number = int(name.partition("-")[0])
        if value is not None and math.isfinite(value) and not self._study.trials[number].state.is_finished():
            self._study.tell(number, [value, *[density] * self._fronts])

    def importance(self) -> dict[str, float]:
        """How much of the metric's variance each key explains, by Optuna; {} while there is too little to say."""
        from optuna.importance import get_param_importances

        done = [trial.values[0] for trial in self._study.trials if trial.values]
        if len(done) < FEWEST or len(set(done)) == 1:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return dict(get_param_importances(self._study, target=lambda trial: trial.values[0]))
        except (ValueError, RuntimeError, ImportError):  # fewer than two finished trials, or all of one value
            return {}

    def _suggest(self, trial: optuna.Trial, key: str, space: Space) -> Any:
        if space.kind == "choice":
            return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in space.values]))
        low, high = space.values
        return rounded(trial.suggest_float(key, low, high, log=space.kind == "loguniform"), low, high)


def _named(number: int, settings: Settings) -> tuple[str, Settings]:
    return f"{number:03d}-{name_of(settings)}", settings
