"""What a run folder holds, and the reading of it; torch is not needed to read the small files.

`read_run` reads a finished run to export it and checks its weights; `read_files` reads what is shown of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from leap_dist.config.family import FamilyConfig
from leap_dist.config.json_file import parse_json, read_json, read_text
from leap_dist.errors import UserError
from leap_dist.run_parts import Card, Certificate, GateCount, Job, Part, PartT, Scores, TensorCount

if TYPE_CHECKING:
    from torch import Tensor

RESOLVED, CERTIFICATE, SCORES = "config.json", "certificate.json", "scores.json"
DATA = "data.json"  # digests of the files that the run was started with, by key
METRICS, JOURNAL = "metrics.jsonl", "mlflow.jsonl"
MODEL, CHECKPOINTS, RANKS = "model", "checkpoints", ".ranks"
REFERENCE = ".dense_reference"  # the dense model trained as long, until the run has ended
REPORT, PLOTS = "report.html", "plots"
PERMUTATION = "permutation.npz"  # by block, the places that its columns come from
HIDDEN = "masks.safetensors"  # packed masks of tensors in which kept weights are exactly zero; others' are their zeros
EXPORTS, CARD = "export", "card.json"  # RUN/export/<kind>/card.json
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
RESTORE = "restore the file, or remove the folder of the run and run the job again"
LARGEST = 2**26  # bytes of a file with an entry for each tensor
LONGEST = 2**30  # bytes of a file with a line for each step
COST = "leap_ms_"  # what the measures of LEAP's own time begin with

STEP_KEYS = {"step", "phase", "loss", "level", "density", "remaining"}  # of a line of metrics.jsonl
SEAL = "sha256"  # the key of a file's digest of its own content


class ExportedWeights:
    """The tensors of an exported folder, one file or several with an index; read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> ExportedWeights:
        from safetensors import safe_open

        for file in self._files():
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._file_of.update(dict.fromkeys(handle.keys(), handle))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Tensor names in name order."""
        return sorted(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor; RuntimeError if no file holds it."""
        if name not in self._file_of:
            raise RuntimeError(f"{name} has a mask, but is not among the weights in {self._folder}")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _files(self) -> list[Path]:
        index = self._folder / INDEX_FILE
        if index.is_file():
            named = set(read_json(index, largest=LARGEST)["weight_map"].values())
            if outside := [file for file in named if not isinstance(file, str) or Path(file).name != file]:
                raise RuntimeError(f"{INDEX_FILE} names {outside[0]!r}, which is not a file of that folder")
            return [self._folder / file for file in sorted(named)]
        if (self._folder / SINGLE_FILE).is_file():
            return [self._folder / SINGLE_FILE]
        raise RuntimeError(f"{self._folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


@dataclass(frozen=True)
class Run:
    """A finished run whose weights are those that its certificate was counted from.

    sealed: whether the certificate holds a digest of its own content; those of older versions hold none, and of them
    only what can be counted from the weights was checked. plain: `folder` is a model that no run pruned.
    """

    folder: Path
    job: dict[str, Any]
    certificate: Certificate
    sealed: bool = True
    plain: bool = False

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the pruned model, removed weights at zero."""
        return self.folder if self.plain else self.folder / MODEL

    @property
    def family(self) -> FamilyConfig | None:
        """How the job names heads, neurons and experts of an architecture that is in no table of ours."""
        section = self.job.get("family")
        return FamilyConfig.model_validate(section) if section else None

    @property
    def digest(self) -> dict[str, Any]:
        """What an export repeats of the certificate, to be recognised by."""
        names = ("target", "density", "masks_sha256", "weights_sha256")
        return {name: getattr(self.certificate, name) for name in names}

    @property
    def granularities(self) -> list[str]:
        """The kinds of units that were pruned, each once."""
        return list(dict.fromkeys(gate.granularity for gate in self.certificate.gates))


def read_run(folder: Path) -> Run:
    """Read a run folder of launch/prune.py. Raises UserError for one that is not finished, or not as it was left."""
    job = _read_job(folder)
    certificate = read_certificate(folder)
    _check_weights(folder, certificate)
    sealed_itself = SEAL in _json(folder / CERTIFICATE)
    return Run(folder, job, certificate, sealed_itself)


def read_run_or_model(folder: Path) -> Run:
    """As read_run; a Hugging Face folder is a run that pruned nothing."""
    is_model = (folder / RESOLVED).is_file() and "architectures" in read_json(folder / RESOLVED)
    return _read_plain(folder) if is_model and job_in(folder) is None else read_run(folder)


def _read_plain(folder: Path) -> Run:
    from safetensors import SafetensorError

    from leap_dist.core.counting import Counter

    counter = Counter([])
    try:
        with ExportedWeights(folder) as weights:
            for name in weights.names():
                counter.add(name, weights.read(name), None)
    except (RuntimeError, SafetensorError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{folder}: the weights cannot be read: {str(error).removeprefix(f'{folder}: ')}") from error
    nothing = {"target": 1.0, "unit": 1, "metrics": {}, "seed": 0, "versions": {}}
    certificate = Certificate.model_validate(counter.result() | nothing)
    return Run(folder, {"model": {"name": str(folder)}}, certificate, plain=True)


def job_in(folder: Path) -> dict[str, Any] | None:
    """The resolved job file, by which a run folder is known; None where there is none."""
    try:
        job = read_json(folder / RESOLVED)
    except UserError:  # not there, or not ours
        return None
    return job if {"leap", "model"} <= job.keys() else None


def _read_job(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"RUN: got {folder}; there is no such folder")
    job = job_in(folder)
    if job is None:
        raise UserError(
            f"RUN: got {folder}; that folder is not a run: it has no {RESOLVED} of a job; "
            "allowed: a folder that launch/prune.py wrote"
        )
    return job


def read_certificate(folder: Path) -> Certificate:
    """Of a finished run. Raises UserError where there is none, or a damaged one."""
    path = folder / CERTIFICATE
    if not path.is_file():
        raise UserError(
            f"{folder}: the run is not finished, it has no {CERTIFICATE}; finish it with "
            f"launch/prune.py --config {quote(str(folder / RESOLVED))} --output {quote(str(folder))} --resume"
        )
    return _checked(Certificate, read_json(path, RESTORE, largest=LARGEST), path)


def _check_weights(folder: Path, certificate: Certificate) -> None:
    """Raises UserError unless the weights are those of the certificate, and its counts are theirs."""
    from safetensors import SafetensorError

    from leap_dist.core.counting import Counter, check_exact
    from leap_dist.core.measure import amounts

    counter, problems = Counter([]), _wrong_sums(certificate)
    try:
        with ExportedWeights(folder / MODEL) as weights:
            problems += [
                f"tensors.{name} is not a weight" for name in certificate.tensors.keys() - set(weights.names())
            ]
            for name in weights.names():
                weight = weights.read(name)
                counter.add(name, weight, None)
                if name in certificate.tensors:
                    problems += _wrong_counts(name, certificate.tensors[name], weight)
    except (RuntimeError, SafetensorError, OSError, ValueError, LookupError) as error:
        problem = str(error).removeprefix(f"{folder / MODEL}: ")
        raise UserError(
            f"{folder / MODEL}: the weights cannot be read: {problem}; restore the folder, or run the job again"
        ) from error
    found = counter.result()["weights_sha256"]
    if found != certificate.weights_sha256:
        raise UserError(
            f"{folder / MODEL}: the weights are not those of the certificate: their sha256 is {found}, "
            f"{CERTIFICATE} says {certificate.weights_sha256}; restore the folder, or run the job again"
        )
    try:
        measure = certificate.measure.model_dump() if certificate.measure else None
        check_exact(*amounts(certificate.model_dump(), measure), certificate.target, certificate.unit)
    except (RuntimeError, ZeroDivisionError, KeyError, TypeError) as error:
        problems.append(str(error))
    if problems:
        raise UserError(
            f"{folder / CERTIFICATE}: does not say what the weights are: {problems[0]}; restore it, or run the job "
            "again"
        )


def _wrong_counts(name: str, tensor: TensorCount, weight: Tensor) -> list[str]:
    """What a certificate says of a tensor that its weights do not."""
    nonzero, size = int((weight != 0).sum()), weight.numel()
    said = (tensor.shape, tensor.numel, tensor.kept - tensor.zeros_kept, tensor.density)
    true = (list(weight.shape), size, nonzero, _share(tensor.kept, size))
    if said == true and tensor.zeros_kept >= 0 and tensor.kept <= size:
        return []
    return [f"tensors.{name} has shape, size, weights that are not zero and density {said}; they are {true}"]


def _wrong_sums(certificate: Certificate) -> list[str]:
    """What is not the sum of its parts."""
    tensors = certificate.tensors
    counted = {name for gate in certificate.gates for name in gate.tensors}
    if lacking := sorted(counted - tensors.keys()):
        return [f"gates prune {lacking[0]}, which is not among tensors"]
    problems = [
        f"tensors.{name}.counted is not whether a gate prunes it"
        for name, tensor in tensors.items()
        if tensor.counted != (name in counted)
    ]
    sums: list[tuple[str, Certificate | GateCount, set[str]]] = [("", certificate, counted)]
    sums += [(f"gates[{place}].", gate, set(gate.tensors)) for place, gate in enumerate(certificate.gates)]
    for where, part, names in sums:
        kept, prunable = (sum(getattr(tensors[name], key) for name in names) for key in ("kept", "numel"))
        said, true = (part.kept, part.prunable, part.density), (kept, prunable, _share(kept, prunable))
        if said != true:
            problems.append(f"{where}kept, prunable and density are {said}; the sums over its tensors are {true}")
    return problems


def _share(kept: int, size: int) -> float:
    return kept / size if size else 1.0


# ---------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class Export:
    """An export by its card: parameters and latency (ms of a forward pass, the first one measured), if it has any."""

    kind: str
    bytes: float
    parameters: float | None
    latency: float | None


@dataclass(frozen=True)
class RunFiles:
    """A finished run. steps: the lines of metrics.jsonl; scores: scores.json; both empty without the file."""

    folder: Path
    certificate: Mapping[str, Any]
    job: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The task's main metric; "" where none was measured."""
        return next(iter(self.certificate.get("metrics", {}).get("pruned", {})), "")

    @property
    def leap_ms(self) -> float | None:
        """Milliseconds of LEAP in a step of the prune phase, the mean over those that were logged."""
        pruning = [line for line in self.steps if line["phase"] == "prune"]
        costs = [sum(value for key, value in line.items() if key.startswith(COST)) for line in pruning]
        return sum(costs) / len(costs) if costs else None


def read_files(folder: Path) -> RunFiles:
    """Raises UserError for a folder that holds no finished run, and for a file that is damaged."""
    if not (folder / CERTIFICATE).is_file():
        raise UserError(f"{folder} holds no finished run: it has no {CERTIFICATE}")
    kinds: dict[str, type[Part]] = {CERTIFICATE: Certificate, RESOLVED: Job, SCORES: Scores}
    found = {name: _json(folder / name) for name in kinds if (folder / name).is_file()}
    for name, content in found.items():
        _checked(kinds[name], content, folder / name)
    return RunFiles(folder, found[CERTIFICATE], found.get(RESOLVED, {}), steps_in(folder), found.get(SCORES, {}))


def exports(folder: Path | None) -> list[Export]:
    """The exports below a run folder, the fastest first, those that cannot be run last; none if it is not there."""
    found = []
    for path in sorted(folder.glob(f"{EXPORTS}/*/{CARD}")) if folder else ():
        card = _checked(Card, _json(path), path)
        latency = card.latency[0].after if card.latency else None
        parameters = card.parameters.after if card.parameters else None
        found.append(Export(card.kind, card.bytes.after, parameters, latency))
    return sorted(found, key=lambda export: (export.latency is None, export.latency or 0.0))


def steps_in(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last one of a run that was killed may be torn, and is left out.

    Raises UserError for a line that is none of ours.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = read_text(path, RESTORE, LONGEST).split("\n")[:-1]
    found = [parse_json(line, f"{path}:{number}", RESTORE, finite=False) for number, line in enumerate(lines, start=1)]
    for number, line in enumerate(found, start=1):
        numbers = [value for key, value in line.items() if key != "phase"]
        whole = line.keys() >= STEP_KEYS and isinstance(line["phase"], str) and type(line["step"]) is int
        if not whole or any(type(value) not in (int, float) for value in numbers):
            raise UserError(
                f"{path}:{number}: damaged: got {json.dumps(line)[:80]}; allowed: an object with "
                f"{', '.join(sorted(STEP_KEYS))}, and more numbers; remove the line, or run the job again"
            )
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, whose digest fits if it has one. Raises UserError."""
    found = read_json(path, RESTORE, finite=False, largest=LARGEST)
    if SEAL in found and found != sealed(found):
        raise UserError(f"{path}: was changed: its {SEAL} is not that of its content; {RESTORE}")
    return found


def _checked(kind: type[PartT], content: Mapping[str, Any], path: Path) -> PartT:
    """What a file holds, with the parts that are relied on; UserError where they are not what they should be."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: damaged: {place}: {first['msg']}; {RESTORE}") from error


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able content with its own digest, by which a change is seen."""
    rest = {key: value for key, value in body.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, SEAL: hashlib.sha256(text.encode()).hexdigest()}
