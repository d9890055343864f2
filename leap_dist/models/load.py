"""The transformers model and tokenizer that a job names, with a head that fits the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leap_dist.config.sections import ModelConfig
from leap_dist.errors import UserError
from leap_dist.models.fit import CONSTANTS, check_loaded
from leap_dist.models.labels import fit_labels
from leap_dist.models.padding import POSITIONS_FROM_PADDING, agree_on_padding, highest_id, num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from leap_dist.tasks.base import Problem, Task

HEADS: dict[Problem, str] = {
    "single_label_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
}
LFS_POINTER = b"version https://git-lfs"
FLOATS = "allowed: weights in bf16, fp16 or fp32, which can be trained: dequantise the model, or take the original"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_tokenizer(model: ModelConfig, other: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that `other` (data.tokenizer) names, or else the one that comes with `model.name`."""
    from transformers import AutoTokenizer

    if (name := other or model.name) is None:
        raise UserError(
            "model.from_config: has no tokenizer; give data.tokenizer, or model.name, or a data.task that is builtin"
        )
    key = "data.tokenizer" if other else "model.name"
    _check_folder(name, key)
    with _hub_errors(name, "tokenizer", key):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    _check_vocabulary(name, tokenizer, key)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders have none; what is exported has to pad as we did
    return tokenizer


def load_model(model: ModelConfig, task: Task, frozen: bool = False) -> PreTrainedModel:
    """A model in fp32 on the CPU, with the head for `task`'s problem and its labels.

    Weights that no file holds (the head; everything, for `from_config`) come from torch's global generator; where
    weights are frozen a folder without the head is refused.
    """
    labels = _labels(task)
    if model.from_config is not None:
        loaded = _random_model({**model.from_config, **labels}, task)
    else:
        assert model.name is not None
        loaded = _pretrained_model(model.name, labels, task, frozen)
    agree_on_padding(loaded, task)
    return loaded


def auto_class(problem: Problem) -> Any:
    """transformers' class that loads models with the head for a problem."""
    import transformers

    return getattr(transformers, HEADS[problem])


def _labels(task: Task) -> dict[str, Any]:
    """What a model's config says of the task."""
    if not task.label_names:
        return {"num_labels": task.num_labels} if task.problem == "question_answering" else {}
    return {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: i for i, name in enumerate(task.label_names)},
        "problem_type": task.problem,
    }


def load_config(name: str) -> PreTrainedConfig:
    """The config of a trained model, as its folder or the hub has it."""
    from transformers import AutoConfig

    _check_folder(name)
    with _hub_errors(name, "config"):
        refuse_kernels(name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------- from a config


def _random_model(settings: dict[str, Any], task: Task) -> PreTrainedModel:
    """A model with random weights from a transformers config object."""
    if settings["model_type"] in POSITIONS_FROM_PADDING and task.pad_id is not None:
        settings = {"pad_token_id": task.pad_id, **settings}
    config = _config_from(settings)
    _check_size(config, task)
    try:
        return auto_class(task.problem).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever transformers' code comes to on the user's config
        raise UserError(f"model.from_config: transformers refuses it: {cause(error)}") from error


def _config_from(settings: dict[str, Any]) -> PreTrainedConfig:
    """The config object; an unknown architecture or an unknown key is an error."""
    from transformers import CONFIG_MAPPING, AutoConfig

    rest = dict(settings)
    kind = rest.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = _nearest(str(kind), list(CONFIG_MAPPING.keys()))
        raise UserError(f'model.from_config.model_type: got "{kind}", which transformers does not know{near}')
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map, "num_labels"}
    unknown = [key for key in rest if key not in known]
    if unknown:
        problem = f"a {kind} config has no such key"
        raise UserError("\n  ".join(f"model.from_config.{key}: {problem}{_nearest(key, known)}" for key in unknown))
    try:
        return AutoConfig.for_model(kind, **rest)
    except Exception as error:  # whatever transformers' code comes to on the user's values
        raise UserError(f"model.from_config: transformers refuses it: {cause(error)}") from error


# ---------------------------------------------------------------------------------------------- pretrained


def _pretrained_model(name: str, labels: dict[str, Any], task: Task, frozen: bool) -> PreTrainedModel:
    """A model with weights from a folder or the hub; a head for another number of labels is made anew."""
    from transformers import AutoConfig

    _check_folder(name)
    with _hub_errors(name, "model"):
        refuse_kernels(name)
        own = AutoConfig.from_pretrained(name, trust_remote_code=False).id2label
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **labels)
    _check_size(config, task)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise UserError(f'model.name: got "{name}"; its config.json has a quantization_config ({method}); {FLOATS}')
    _check_weights(name)
    with _hub_errors(name, "model"), quiet_transformers():
        model, report = auto_class(task.problem).from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,  # of a .bin file: no pickled code
            ignore_mismatched_sizes=True,  # looked at below: only the head may differ
            output_loading_info=True,
        )
    new = check_loaded(name, model, report, causal=task.problem == "causal_lm", frozen=frozen)
    if task.problem == "single_label_classification" and not new:
        fit_labels(name, model, own, task.label_names)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no table of the weights that a new head lacks: `check_loaded` looks at those."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _hub_errors(name: str, what: str, key: str = "model.name") -> Iterator[None]:
    """transformers' refusals as the user's mistake: a wrong name, no network, a broken folder."""
    content = "a tokenizer" if what == "tokenizer" else "config.json and weights"
    allowed = f"allowed: a local folder with {content}, or a hub id (needs network, or its cache)"
    _check_pointers(name, key)
    lacks = lacks_file(Path(name)) if what == "tokenizer" else ""
    with others_code(f'{key}: got "{name}"; its {what}', lacks + allowed):
        yield


def lacks_file(folder: Path) -> str:
    """For a message on a tokenizer: what most have, and this folder has not. Some do without it."""
    return "there is no tokenizer.json; " if folder.is_dir() and not (folder / "tokenizer.json").is_file() else ""


def refuse_kernels(name: str | Path) -> None:
    """Raises UserError where the config of a folder or of a hub model names a kernel of the hub.

    As an attention implementation with a "/" in its name: transformers would fetch its code, and run it.
    """
    from transformers import PreTrainedConfig

    settings, _ = PreTrainedConfig.get_config_dict(str(name))
    for key, value in _implementations(settings):
        if "/" in value:
            raise UserError(
                f'{name}: config.json: {key}: got "{value}", code of the hub, which is never run here; allowed: what '
                'transformers has itself, such as "sdpa"; remove the key'
            )


def _implementations(settings: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of all that says how something is computed, in configs of configs too."""
    for key, value in settings.items():
        place = inside or (key if "implementation" in key else "")
        if isinstance(value, Mapping):
            yield from _implementations(value, place)
        elif place and isinstance(value, str):
            yield place, value


@contextmanager
def others_code(what: str, allowed: str) -> Iterator[None]:
    """Where transformers' code reads a user's files: whatever it raises is one message with the cause's words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} comes with code of its own (auto_map), which is never run here; allowed: an architecture "
                f"that transformers {_version()} has; use a version of transformers that has this one, or a folder "
                "converted to one that it has"
            ) from error
        raise UserError(f"{what} cannot be loaded: {cause(error)}; {allowed}") from error


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _check_pointers(name: str, key: str) -> None:
    """A clone without Git LFS holds pointers of three lines in place of large files."""
    folder = Path(name)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f'{key}: got "{name}"; {file.name} there is a pointer of Git LFS, not the file itself; '
                "run git lfs pull in that folder, or download the file"
            )


def _check_folder(name: str, key: str = "model.name") -> None:
    """A name that can only be a path must be a folder; a model's holds a config.json."""
    folder = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists()
    if is_path and not folder.is_dir():
        raise UserError(f'{key}: got "{name}"; there is no such folder')
    if is_path and key == "model.name" and not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "holds a PEFT adapter: merge it with its model, and save that" if adapter else "has no config.json"
        raise UserError(f'model.name: got "{name}"; that folder {what}')


def _check_weights(name: str) -> None:
    """A local folder must hold weights."""
    folder = Path(name)
    if folder.is_dir() and not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        raise UserError(f'model.name: got "{name}"; that folder has no weights ({" or ".join(WEIGHT_FILES)})')
    with _hub_errors(name, "model"):
        for file in folder.glob("*.safetensors") if folder.is_dir() else ():
            _check_floats(name, file)


def _check_floats(name: str, file: Path) -> None:
    """Quantised weights without a config that says so would be read as numbers, without their scales."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if key.endswith(CONSTANTS):  # masks of older versions, in bytes
                continue
            if (dtype := tensors.get_slice(key).get_dtype()).startswith(("I8", "U8", "F8", "F4")):
                raise UserError(f'model.name: got "{name}"; {key} is stored as {dtype}, quantised; {FLOATS}')


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """A local folder must hold the words: transformers would make a tokenizer of special tokens alone."""
    files = sorted(set(tokenizer.vocab_files_names.values()))
    folder = Path(name)
    if files and folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise UserError(f'{key}: got "{name}"; that folder has no tokenizer ({" or ".join(files)})')


def _check_size(config: PreTrainedConfig, task: Task) -> None:
    """The model must have a row for every token id and a position for every token, and read as the task asks."""
    text = config.get_text_config()
    _check_enough(task.name, "vocab_size", getattr(text, "vocab_size", None), highest_id(task), "token ids")
    check_positions(config, task.name, task.max_length)
    _check_direction(config, task)


def check_positions(config: PreTrainedConfig, task: str, longest: int | None) -> None:
    """The model must have a position for every token of a task's longest example."""
    what = "tokens in its longest example; or set data.max_length to what the model has"
    _check_enough(task, "max_position_embeddings", num_positions(config), longest, what)


def _check_enough(task: str, key: str, size: int | None, needed: int | None, what: str) -> None:
    if size is not None and needed is not None and size < needed:
        raise UserError(f"model: {key} is {size}; allowed: at least {needed}, {task} has {needed} {what}")


def _check_direction(config: PreTrainedConfig, task: Task) -> None:
    """A model that sees the words after a token is no causal language model: it would copy the answer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task.problem == "causal_lm" and both_ways:
        raise UserError(
            f'data.task: got "{task.name}", but a {config.model_type} model is bidirectional; allowed: a decoder, '
            'or "task": "mlm"'
        )


def _nearest(value: str, names: Any) -> str:
    near = get_close_matches(value, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def cause(error: Exception) -> str:
    """The first line of what an error says, with its kind where the words alone say little."""
    text = str(error).strip().splitlines()
    if text and isinstance(error, OSError | ValueError | RuntimeError):
        return text[0]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
