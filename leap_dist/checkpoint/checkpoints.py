"""Checkpoints: written in the background by all ranks, read at any number of ranks and any ZeRO stage.

Saving copies a rank's state to host memory; a thread writes it while training continues. Loading looks up, for every
fragment that a rank holds now, the stored runs that overlap it, and opens only the files that hold them.
"""

import copy
import functools
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from leap_dist.checkpoint import elastic, folders
from leap_dist.checkpoint.engine_state import (
    buffer_key,
    buffer_table,
    engine_state,
    fragment_states,
    gate_table,
    persistent_buffers,
    random_states,
    restore_engine,
    restore_random,
    section_of,
    tensor_table,
    unfinished,
    written_by,
)
from leap_dist.checkpoint.folders import CheckpointError, checkpoints_in, step_of
from leap_dist.checkpoint.manifest import MANIFEST, Damaged, Manifest
from leap_dist.config.section import is_int
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError, printable
from leap_dist.zero.agreement import agreement
from leap_dist.zero.ranks import Ranks

_OWN: WeakKeyDictionary[Any, set[Path]] = WeakKeyDictionary()
"""The folders that an engine has loaded from or saved to: what is later there than its run, that has left itself."""


class Checkpoints:
    """The checkpoints of a run below `folder`: the `keep` latest, and the one with the highest score.

    In a loop of one's own, with an engine of `leap_dist.initialize`, on every rank:

        checkpoints = leap_dist.Checkpoints("checkpoints")
        start = (checkpoints.load(engine) or {"step": 0})["step"]
        for step in range(start, total):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(engine, {"step": step + 1})
        checkpoints.wait()

    They are read at any number of ranks and any ZeRO stage. `folder` is on a file system that all ranks share; `ranks`
    are this process's if not given, as they are at the first call. Every method is collective. One save is written at a
    time; its host memory is kept for the next one. Raises UserError for a folder or a number to keep that cannot be.
    """

    def __init__(self, folder: str | Path, ranks: Ranks | None = None, keep: int = 2) -> None:
        if not isinstance(folder, str | Path) or not str(folder):
            raise UserError(
                f"folder: got {folder!r}; allowed: the path of a folder, which is created if it does not exist"
            )
        if not is_int(keep) or keep < 1:
            raise UserError(f"keep: got {keep!r}; allowed: an integer >= 1")
        self._folder, self._given, self._keep = Path(folder).expanduser(), ranks, keep
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._final: Path | None = None  # the checkpoint that is being written
        self._error: Exception | None = None  # of the thread, or of the start of the save

    @functools.cached_property
    def _ranks(self) -> Ranks:
        """Looked up when they are first needed: this may be made before `initialize` joins them."""
        return self._given or Ranks.here()

    def save(self, engine: Any, progress: Mapping[str, Any], score: float | None = None) -> None:
        """Begin to write `step-<n>`; `progress` is JSON-able, of a score higher is better.

        Waits for the save before this one. If that one failed, CheckpointError says so once this one has begun: a
        caller that continues misses nothing. What goes wrong with this one is reported by the next `save` or `wait`.
        Raises UserError where the folder has later ones and none was loaded: they are of another run.
        """
        _check_engine(engine)
        self._refuse_other_runs(engine)
        failure = self._finish()
        agreement(engine, self._ranks)
        rank, fragments = self._ranks.rank, written_by(engine, self._ranks.rank)
        tensors = {f"{f.tensor}/{key}": view for f in fragments for key, view in fragment_states(engine, f)}
        buffers = {buffer_key(name): buffer for name, buffer in persistent_buffers(engine).items()}
        tensors = self._copied(tensors | buffers | random_states())
        runs = {f.tensor: (f.start, f.length) for f in fragments}
        self._final = self._folder / f"step-{engine.leap.num_steps:08d}"
        write = functools.partial(folders.write_part, self._final, rank, tensors, runs)
        self._start(functools.partial(self._write, self._final, write, self._manifest(engine, progress, score)))
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Return when the save that was begun is complete on disk; raises CheckpointError if it failed."""
        failure = self._finish()
        if failure is not None:
            raise failure

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Put the newest intact checkpoint into an engine built from the same model and gates; returns its `progress`.

        None if there is no checkpoint. A damaged one is skipped with a line of warning. Random states are taken
        over if the number of ranks is the same; of buffers, such as running means, each rank's own then, and the first
        rank's at another number. Raises UserError if none is intact, or if it is of another model, of other gates, of
        another leap section or of another version.
        """
        _check_engine(engine)
        names = self._ranks.on_first(lambda: [path.name for path in checkpoints_in(self._folder)])
        damage = ""
        for name in names:
            plan, damage = self._agreed_plan(self._folder / name, engine)
            if plan is not None:
                plan.fill()
                restore_engine(engine, plan.manifest.engine)
                _check_masks(self._folder / name, engine, plan.manifest)
                restore_random(plan.random)
                agreement(engine, self._ranks)
                _OWN.setdefault(engine, set()).add(self._folder.absolute())
                return dict(plan.manifest.progress)
            if self._ranks.first:
                print(printable(f"warning: {self._folder / name} is damaged and not used: {damage}"), flush=True)
        if names:
            raise UserError(
                f"--resume: no checkpoint in {self._folder} is intact; the oldest, {names[-1]}: {damage}; "
                "start the run again, in another folder"
            )
        return None

    # Saving

    def _refuse_other_runs(self, engine: Any) -> None:
        """Later checkpoints would be removed, as what a run leaves that had to go back to before them."""
        own = _OWN.setdefault(engine, set())
        if self._folder.absolute() in own:
            return
        newest = self._ranks.on_first(lambda: next((path.name for path in checkpoints_in(self._folder)), None))
        if newest is not None and step_of(Path(newest)) > engine.leap.num_steps:
            raise UserError(
                f"folder: {self._folder} has {newest} of another run, and this one is at step {engine.leap.num_steps}; "
                "give each run a folder of its own, or call load first to resume that run"
            )
        own.add(self._folder.absolute())

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, the same at every save."""
        for name, tensor in tensors.items():
            copy = self._host.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):  # buffers may change theirs
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._host[name] for name in tensors}

    def _manifest(self, engine: Any, progress: Mapping[str, Any], score: float | None) -> Callable[..., Manifest]:
        """The manifest, but for the files."""
        return functools.partial(
            Manifest,
            world_size=self._ranks.world_size,
            gates=gate_table(engine),
            tensors=tensor_table(engine),
            buffers=buffer_table(engine),
            section=section_of(engine),
            engine=engine_state(engine),
            progress=copy.deepcopy(dict(progress)),  # the caller continues
            score=score,
        )

    def _start(self, write: Callable[[], None]) -> None:
        """Let a thread write, once the first rank has made the folder; if it cannot, nothing is begun."""
        assert self._final is not None
        if self._ranks.first:
            try:
                folders.make_room(self._final)
            except OSError as error:
                self._error = CheckpointError(folders.explain(error, self._final, "nothing is written yet"))
        if not any(self._ranks.gather_objects(self._error is not None)):
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()

    def _write(self, final: Path, write: Callable[[], None], manifest: Callable[..., Manifest]) -> None:
        """What the thread does. It must not communicate: the other ranks' threads are anywhere."""
        try:
            write()
            if self._ranks.first:
                files = folders.await_parts(final, self._ranks.world_size)
                folders.complete(final, manifest(files=files), self._keep)
        except Exception as error:  # for the caller of the next save
            self._error = error
            if self._ranks.first:
                shutil.rmtree(folders.partial_of(final), ignore_errors=True)

    def _finish(self) -> CheckpointError | None:
        """Wait for the thread; what went wrong on any rank, the first rank's word first, on every rank."""
        if self._final is None:  # nothing was begun, on any rank
            return None
        if self._thread is not None:
            self._thread.join()
        error, self._error, self._thread = self._error, None, None
        words = None if error is None else _words(error)
        found = [said for said in self._ranks.gather_objects(words) if said is not None]
        if not found:
            return None
        partial = folders.partial_of(self._final)  # the last of the others has ended; no rank returns before it is gone
        self._ranks.on_first(functools.partial(shutil.rmtree, partial, ignore_errors=True))
        failure = CheckpointError(found[0])
        failure.__cause__ = error
        return failure

    # Loading

    def _agreed_plan(self, checkpoint: Path, engine: Any) -> tuple[elastic.Restoring | None, str]:
        """How this rank reads a checkpoint, if all ranks can; else what is damaged. Raises UserError on all ranks."""
        plan, damage, wrong = None, None, None
        try:
            plan = elastic.plan_restoring(checkpoint, engine, self._ranks)
        except (Damaged, OSError) as error:
            damage = str(error)
        except UserError as error:
            wrong = str(error)
        everyone = self._ranks.gather_objects((damage, wrong))
        for _, words in everyone:
            if words is not None:
                raise UserError(words)
        damages = [words for words, _ in everyone if words is not None]
        return (None, damages[0]) if damages else (plan, "")


def _check_masks(checkpoint: Path, engine: Any, manifest: Manifest) -> None:
    """Raises UserError on all ranks if the masks do not keep what the manifest says of them. Collective."""
    said = manifest.engine.leap
    if said.masked and (found := engine.leap.masks.count_kept()) != said.kept_weights:
        raise UserError(
            f"--resume: {checkpoint / MANIFEST} was changed: engine.leap.kept_weights is {said.kept_weights}, the "
            f"masks keep {found}; remove that checkpoint to resume from an older one, or start a new run"
        )


def _check_engine(engine: Any) -> None:
    """Raise UserError for what no checkpoint is taken of."""
    if not isinstance(getattr(engine, "leap", None), LeapAdamW):
        raise UserError(f"engine: got a {type(engine).__name__}; allowed: one that leap_dist.initialize or attach made")
    if engine.leap.config.mode == "one_shot":
        raise UserError('engine: leap.mode is "one_shot", which takes no step that could be saved or resumed')
    if done := unfinished(engine):
        raise UserError(f"engine: it is in the middle of a step, {done}; save and load between optimizer steps")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"a checkpoint failed: {type(error).__name__}: {error}"
