"""The kinds of export: what each writes, and the card that goes with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from leap_dist.errors import UserError
from leap_dist.export import gguf, gguf_words, int8, llama, onnx
from leap_dist.export.card import Card, Pair, share_of
from leap_dist.export.engines import engines_of, stock_faults
from leap_dist.export.hf import load_exported, load_exported_tokenizer, without_weights
from leap_dist.export.latency import LONGEST, Runner, torch_runner, torch_threads
from leap_dist.export.masks import save_masks
from leap_dist.export.metric import Judged, judge, with_types
from leap_dist.export.place import SCRATCH, refuse_foreign, refuse_other_run, taken, written
from leap_dist.export.push import hub_id
from leap_dist.export.semi_structured import check_semi_structured, write_marker
from leap_dist.export.shrunk import Models, compared_sizes
from leap_dist.export.speed import BATCHES, block_notes, latencies, latency_work
from leap_dist.export.time_left import TimeLeft
from leap_dist.export.vocabulary import TEXT, Vocabulary, Wanted, cut_vocabulary
from leap_dist.files import staged
from leap_dist.machine import machine
from leap_dist.models.flops import count_flops
from leap_dist.models.hub_names import hub_state, save_as_on_hub
from leap_dist.models.outputs import example_inputs
from leap_dist.models.pruned_json import NAME as PRUNED_JSON
from leap_dist.run_folder import ExportedWeights, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSEALED = (
    "The run's certificate is of an older version, without a digest of its own content: its counts and densities were "
    "counted again from the weights; its metrics, the kinds of its gates, seed and versions could not be checked."
)
WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".data", ".gguf")


@dataclass(frozen=True)
class Exported:
    """What a kind wrote: the model in it, if any, how to run it, and what to know about it."""

    notes: list[str]
    model: PreTrainedModel | None = None
    runner: Runner | None = None
    engine: str = "torch"
    difference: float | None = None
    batches: tuple[int, ...] = BATCHES
    judged: Runner | None = None
    """Gives all logits; of a kind that computes with other numbers than the run, whose metrics are measured anew."""


def parse_kinds(text: str) -> list[str]:
    """ "hf,onnx" -> the kinds, each once. UserError for those that do not exist."""
    kinds = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        near = dict.fromkeys(match for kind in wrong for match in get_close_matches(kind, KINDS, n=1))
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        got = ", ".join(f'"{kind}"' for kind in wrong)
        raise UserError(f"--to: got {got}; allowed: {', '.join(KINDS)}{hint}")
    if not kinds:
        raise UserError(f"--to: got nothing; allowed: one or more of {', '.join(KINDS)}")
    return kinds


def export_run(
    run: Run,
    kinds: Sequence[str],
    output: Path,
    threads: int,
    latency: bool = True,
    wanted: Wanted | None = None,
) -> Iterator[Card]:
    """Write `output`/<kind> for every kind, and yield its card when it is there under its name.

    Latencies are measured, if asked for, on `threads` threads. wanted: the tokens that every export keeps; None: all.
    UserError, with nothing written, for what the user has to mend.
    """
    _check(run, kinds, output, wanted)
    with taken(output, kinds, KINDS), _vocabulary(run, output, wanted) as (folder, vocabulary):
        models = Models(run, folder=folder)
        timed = [kind for kind in kinds if latency and kind != "mask"]
        measured = [
            (latency_work(models.length, batch), 2.0 * models.length * batch, LONGEST)
            for batch in BATCHES
            for _ in timed
        ]
        progress = TimeLeft(_work(kinds, models), measured)
        models.say = progress.begin
        if in_gguf := _in_gguf(kinds):
            gguf.refuse(in_gguf, gguf_words.problem(load_exported_tokenizer(models.folder)))
            gguf.refuse(in_gguf, gguf.problem(models.stock or models.shrunk))  # takes long
        if "int8_torch" in kinds and models.stock is None:
            wrong = f"no config of transformers describes the model: {gguf.UNIFORM}"
            raise UserError(f"--to int8_torch: {wrong}, or take int8")
        for kind in kinds:
            progress.of = kind
            with written(output / kind), staged(output / kind) as folder, torch_threads(threads):
                exported = KINDS[kind](models, folder, threads)
                card = _card(kind, models, exported, folder, threads, latency, vocabulary)
                card.write(folder)
            yield card


def _check(run: Run, kinds: Sequence[str], output: Path, wanted: Wanted | None) -> None:
    """What can be told before a weight is read. UserError for a place, a library or a kind that does not go."""
    refuse_other_run(output, run)
    for kind in kinds:
        refuse_foreign(output / kind)
    for kind in ("onnx", "int8"):
        if kind in kinds:
            onnx.require_libraries(f"--to {kind}")
    if set(kinds) != {"mask"}:
        load_exported_tokenizer(run.model)  # it lies beside all others, and has to be whole
    if "int8_torch" in kinds:
        int8.require_torchao("--to int8_torch")
    if "semi_structured" in kinds:
        check_semi_structured(run)
    if in_gguf := _in_gguf(kinds):
        gguf.require_library(f"--to {', '.join(in_gguf)}")
        gguf.refuse(in_gguf, gguf.problem_of_config(without_weights(run.model)))
    if "gguf_q4_k_m" in kinds:
        llama.require_library("--to gguf_q4_k_m")
    if "mask" in kinds and (wanted or run.plain):
        raise UserError(f"--to mask: not of a model that no run pruned, and not with {TEXT}; export the masks of a run")


def _in_gguf(kinds: Sequence[str]) -> list[str]:
    return [kind for kind in kinds if kind in gguf.KINDS]


@contextmanager
def _vocabulary(run: Run, output: Path, wanted: Wanted | None) -> Iterator[tuple[Path, Vocabulary | None]]:
    """The run's model with the tokens that are wanted, in a folder that is there for the block; else its own."""
    if wanted is None:
        yield run.model, None
        return
    with ExitStack() as stack:
        with written(output):
            prefix, suffix = SCRATCH
            made = TemporaryDirectory(prefix=prefix, suffix=suffix, dir=output)
            folder = Path(stack.enter_context(made), "model")
            vocabulary = cut_vocabulary(run.model, folder, wanted)
        yield folder, vocabulary


def _work(kinds: Sequence[str], models: Models) -> float:
    """About as many tokens go through a model for the exports, or could meanwhile; latencies are not among it."""
    compared = 2.0 * sum(batch * length for batch, length in compared_sizes(models.masked))
    own = {
        "hf": compared,
        "shrunk": compared,
        "onnx": sum(onnx.work_of(models.masked, models.length)),
        "int8": sum(int8.work_of(models.masked, models.length)),
        "int8_torch": 2 * compared,
    }
    shrunk = compared if set(kinds) - {"hf", "mask", "semi_structured"} else 0.0
    return shrunk + sum(own.get(kind, 0.0) + 2 * models.length for kind in kinds if kind != "mask")


# ---------------------------------------------------------------------------------------------- what is written


def _not_the_model(place: str, names: list[str]) -> list[str]:
    """Of a model's folder: what lies in it besides, such as its exports."""
    return [name for name in names if Path(place, name).is_dir()]


def _hf(models: Models, folder: Path, threads: int) -> Exported:
    shutil.copytree(models.folder, folder, ignore=_not_the_model)
    renamed = _rename_as_on_hub(folder) if models.cut or not models.run.plain else False
    model = load_exported(folder)
    found = models.difference_of(model)
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    of = "model" if models.cut else "run"
    same = f"the {of}'s weights" + (" by the names of checkpoints on the hub" if renamed else ", byte for byte")
    notes = [f"A stock Hugging Face folder with {same}; {nonzero:,} parameters are not zero."]
    notes += [
        f"{gone} were removed: stock AutoModel would still {does}, and compute something else than the run measured: "
        f"its logits differ by {found:.2g} of the largest. Serve the `shrunk` export."
        for gone, does in stock_faults(models.run.granularities, found)
    ]
    return Exported(notes, model, torch_runner(model, last=True), difference=found)


def _rename_as_on_hub(folder: Path) -> bool:
    """Write the weights in a model's folder as checkpoints on the hub have them; whether they were not before."""
    model = load_exported(folder, "auto")
    with ExportedWeights(folder) as weights:
        names = weights.names()
    if hub_state(model, model.state_dict()).keys() >= set(names):
        return False
    with TemporaryDirectory(dir=folder) as scratch:
        save_as_on_hub(model, Path(scratch))
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        for new in Path(scratch).glob("*.safetensors*"):
            new.rename(folder / new.name)
    return True


def _shrunk(models: Models, folder: Path, threads: int) -> Exported:
    stock, model = models.save_shrunk(folder), models.shrunk
    also = "transformers alone loads it too" if stock else "stock AutoModel cannot: no config of transformers says it"
    dtype = str(models.dtype).removeprefix("torch.")
    notes = [
        f"Load with `leap_dist.load_pruned(folder)`; {also}. Its weights are in {dtype}.",
        f"Its logits differ from the masked model's by {models.difference:.2g} of the largest (random inputs, fp32).",
    ]
    return Exported(notes, model, torch_runner(model, last=True), difference=models.difference)


def _onnx(models: Models, folder: Path, threads: int) -> Exported:
    folder.mkdir()
    model, path = models.shrunk, folder / onnx.FILE
    found = onnx.save_onnx(model, path, models.length, models.say)
    _beside_onnx(models, folder)
    notes = [
        f"Inputs: {', '.join(onnx.model_inputs(model, 1, 1))}, int64 (batch, length), both free. Output: logits.",
        "config.json (labels, sizes) is that of the model before pruning.",
        f"Its logits differ from torch's by {found:.2g} of the largest (random inputs, several sizes, padding).",
    ]
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        notes.append("Experts run as a batched product over gathered weights: memory grows with the number of tokens.")
    return Exported(notes, model, onnx.onnx_runner(path, threads), "onnxruntime", found)


def _beside_onnx(models: Models, folder: Path) -> None:
    """Config and tokenizer."""
    models.shrunk.config.save_pretrained(folder)
    if (tokenizer := load_exported_tokenizer(models.folder)) is not None:
        tokenizer.save_pretrained(folder)


def _gguf(models: Models, folder: Path, threads: int, kind: str | None) -> Exported:
    folder.mkdir()
    config, in_bits = models.masked.config, kind == gguf.Q4_K_M
    saved = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(models.saved_dtype, "F32")
    tokenizer = load_exported_tokenizer(models.folder)
    path, name = folder / gguf.FILE, hub_id(models.run) or config.model_type
    written = saved if kind is None or in_bits else kind
    notes = gguf.save_gguf(models.stock or models.shrunk, tokenizer, path, written, name)
    if in_bits:
        llama.requantize(path, gguf.Q4_K_M, threads)
    notes = [f"For llama.cpp and what is built on it; matrices in {kind or saved}, {gguf.SAID[kind]}.", *notes]
    if not llama.is_here():
        return Exported([*notes, llama.NOT_HERE], models.shrunk)
    last, every = (llama.llama_runner(path, threads, every) for every in (False, True))
    return Exported(notes, models.shrunk, last, "llama.cpp", batches=BATCHES[:1], judged=every)


def _mask(models: Models, folder: Path, threads: int) -> Exported:
    folder.mkdir()
    bits = save_masks(models.run, folder)
    return Exported(
        [
            "Load with `leap_dist.export.masks.load_masks(folder)`: bool tensors by name, True = kept.",
            "mask.npz has it for numpy alone: `<name>` is packbits of the flat mask, `<name>.__shape__` its size.",
            f"{bits:,} bits, 8 a byte; sha256 over all of them as in the certificate: "
            f"{models.run.certificate.masks_sha256}.",
        ]
    )


def _semi_structured(models: Models, folder: Path, threads: int) -> Exported:
    names = check_semi_structured(models.run)
    shutil.copytree(models.folder, folder, ignore=_not_the_model)
    write_marker(folder, names)
    notes = [
        f"{len(names)} matrices are 2:4 sparse along their input dimension.",
        "Load with `leap_dist.export.semi_structured.load_semi_structured(folder)`: on a GPU with torch's 2:4 "
        "kernels (not run by us), on the CPU dense.",
    ]
    return Exported(notes, models.masked, torch_runner(models.masked, last=True), difference=0.0)


def _int8(models: Models, folder: Path, threads: int) -> Exported:
    folder.mkdir()
    path = folder / onnx.FILE
    found = int8.save_int8_onnx(models.shrunk, path, models.length, models.say)
    _beside_onnx(models, folder)
    runner = onnx.onnx_runner(path, threads)
    notes = [
        "For onnxruntime, as the `onnx` kind; weights and embeddings in 8 bits, what meets them brought to 8 bits as "
        "it comes.",
        f"Its logits differ from the fp32 model's by {found:.2g} of the largest (random inputs).",
    ]
    return Exported(notes, models.shrunk, runner, "onnxruntime", found, judged=with_types(runner))


def _int8_torch(models: Models, folder: Path, threads: int) -> Exported:
    models.save_shrunk(folder)
    (folder / PRUNED_JSON).unlink()  # load_pruned reads no weights in 8 bits
    model = int8.save_int8_torch(folder)
    found = models.difference_of(model)
    notes = [
        "For AutoModel where torchao is installed; the linear layers' weights in 8 bits, a scale for each row; "
        "embeddings and head as they were.",
        f"Its logits differ from the fp32 model's by {found:.2g} of the largest (random inputs).",
    ]
    runner = torch_runner(model, last=True)
    return Exported(notes, models.shrunk, runner, "torch, torchao", found, judged=torch_runner(model))


KINDS: dict[str, Callable[[Models, Path, int], Exported]] = {
    "hf": _hf,
    "shrunk": _shrunk,
    "onnx": _onnx,
    "mask": _mask,
    "semi_structured": _semi_structured,
    **{name: partial(_gguf, kind=kind) for name, kind in gguf.KINDS.items()},
    "int8": _int8,
    "int8_torch": _int8_torch,
}


# ---------------------------------------------------------------------------------------------- the card


def _card(
    kind: str,
    models: Models,
    exported: Exported,
    folder: Path,
    threads: int,
    latency: bool,
    vocabulary: Vocabulary | None,
) -> Card:
    certificate, model = models.run.certificate, exported.model
    inputs = example_inputs(models.masked, 1, models.length)
    if model:
        models.say("counting FLOPs", 2 * models.length)
    timed = (exported.runner, exported.engine, threads, exported.batches)
    times, left_out = latencies(models, *timed) if latency else ([], [])
    judged = judge(models, exported.judged) if exported.judged else None
    if judged:
        said = judged.note() if isinstance(judged, Judged) else f"Metrics are not measured here: {judged}."
        left_out = [said, *left_out]
    blocks = block_notes(models) if latency and kind == "shrunk" else []
    return Card(
        kind=kind,
        target=certificate.target,
        density=certificate.density,
        metrics=certificate.metrics,
        bytes=Pair(weight_bytes(models.run.model), weight_bytes(folder)),
        parameters=Pair(_num_parameters(models.dense), _num_parameters(model)) if model else None,
        flops_before=count_flops(models.dense, inputs) if model else None,
        flops_after=count_flops(model, inputs) if model else None,
        latency=times,
        logit_difference=exported.difference,
        notes=[
            *exported.notes,
            *(vocabulary.notes() if vocabulary else []),
            *blocks,
            *left_out,
            *([] if models.run.sealed else [UNSEALED]),
        ],
        vocabulary=vocabulary,
        judged=judged if isinstance(judged, Judged) else None,
        share=share_of(certificate),
        masks_sha256=certificate.masks_sha256,
        weights_sha256=certificate.weights_sha256,
        machine=machine(),
        base_model=hub_id(models.run),
        engines=engines_of(kind, models, exported.difference),
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
