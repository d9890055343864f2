"""An exported model as an MLflow model: saved without pickle, loaded by `mlflow.pyfunc.load_model`.

A text model that transformers has a pipeline for is saved with MLflow's own flavour, and served without leap_dist. Of
any other, of a shrunk one, and of one that transformers alone would compute otherwise than its run, this module is the
loader: it takes a table, and gives the logits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
}
"""By the end of an architecture's name."""


@contextmanager
def saved(folder: Path, model: LoggedModel) -> Iterator[Path]:
    """The files of `model` from a Hugging Face folder, in a folder that is removed when the block ends."""
    import mlflow

    from leap_dist.models.load import quiet_transformers

    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        path = Path(scratch) / "model"
        about = mlflow.models.Model(run_id=model.source_run_id, model_id=model.model_id)
        needed = [f"{name}=={version(name)}" for name in ("torch", "transformers")]
        pruned, task = _pruned_in(folder), _pipeline_of(folder)
        if task is not None and not (pruned and _is_otherwise(folder, pruned)):
            mlflow.transformers.save_model(
                _pipeline(task, folder), str(path), mlflow_model=about, pip_requirements=needed
            )
        else:
            needed.append(f"leap_dist=={version('leap_dist')}")
            mlflow.pyfunc.save_model(
                path,
                loader_module=__name__,
                data_path=str(folder),
                mlflow_model=about,
                pip_requirements=needed,
                signature=_signature(folder),
                model_config=pruned or None,
            )
        yield path


def _signature(folder: Path) -> ModelSignature:
    """What `Served` takes and gives; registries that ask for a schema take no model without one."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array
    from transformers import AutoConfig

    from leap_dist.export.hf import has_tokenizer

    config = AutoConfig.from_pretrained(folder)
    kind: Any = DataType.string
    optional: tuple[str, ...]
    if has_tokenizer(folder):
        needed, optional = "text", ("text_pair",)
    elif hasattr(config, "image_size"):
        kind, needed, optional = Array(Array(Array(DataType.double))), "pixel_values", ()
    else:
        kind, needed, optional = Array(DataType.long), "input_ids", ("attention_mask", "token_type_ids")
    inputs: list[Any] = [ColSpec(kind, needed), *(ColSpec(kind, name, required=False) for name in optional)]
    one_answer = config.architectures[0].endswith("Classification") and "Token" not in config.architectures[0]
    shape = (-1, config.num_labels) if one_answer else (-1, -1, -1)
    return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype(np.float32), shape)]))


def _pipeline_of(folder: Path) -> str | None:
    """The transformers task that serves the folder without leap_dist; None if there is none."""
    from leap_dist.export.hf import has_tokenizer
    from leap_dist.models.pruned_json import NAME

    if (folder / NAME).is_file() or not has_tokenizer(folder):
        return None
    architecture = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    return next((task for end, task in PIPELINES.items() if architecture.endswith(end)), None)


def _pipeline(task: Any, folder: Path) -> Any:
    from transformers import pipeline

    from leap_dist.export.hf import load_exported, load_exported_tokenizer

    tokenizer: Any = load_exported_tokenizer(folder)
    return pipeline(task, model=load_exported(folder), tokenizer=tokenizer, device="cpu")


# ------------------------------------------------------------------------------ what a run's model computes


def _pruned_in(folder: Path) -> dict[str, Any]:
    """What `_compute_as_run` needs to know of a run's model, for MLflow's file; {}: nothing, it is a stock model."""
    from leap_dist.run_folder import CERTIFICATE, job_in, read_certificate

    if not (folder.parent / CERTIFICATE).is_file():
        return {}
    certificate = read_certificate(folder.parent)
    tensors = certificate.tensors.items()
    found = {
        "experts": any(gate.granularity == "expert" for gate in certificate.gates),
        "norms": [name for name, tensor in tensors if name.endswith(".weight") and len(tensor.shape) == 1],
    }
    return found | {"family": (job_in(folder.parent) or {}).get("family")} if any(found.values()) else {}


def _compute_as_run(model: PreTrainedModel, pruned: dict[str, Any]) -> list[RemovableHandle]:
    """Hook what of a run's model transformers alone would compute otherwise; the handles' `remove` undoes it."""
    from leap_dist.config.family import FamilyConfig
    from leap_dist.models.kept import compute_among_kept

    family = FamilyConfig.model_validate(pruned["family"]) if pruned["family"] else None
    return compute_among_kept(model, ["expert"] if pruned["experts"] else [], pruned["norms"], family)


def _is_otherwise(folder: Path, pruned: dict[str, Any]) -> bool:
    """Whether transformers alone makes another model of a run's text model than the one that the run measured."""
    from leap_dist.export.hf import load_exported
    from leap_dist.export.shrunk import SHRUNK_TOLERANCE
    from leap_dist.models.outputs import example_inputs, relative_difference, result_of

    if pruned["experts"]:  # the router's zeros can win for some other text
        return True
    model = load_exported(folder)
    if not (hooks := _compute_as_run(model, pruned)):
        return False
    inputs = example_inputs(model)
    measured = result_of(model, inputs)
    for hook in hooks:
        hook.remove()
    return relative_difference(result_of(model, inputs), measured) > SHRUNK_TOLERANCE


# ---------------------------------------------------------------------------------------------- the loader


class Served:
    """What MLflow serves. A table has texts as `text`, of pairs also `text_pair`, or lists by the model's names.

    pruned: what `_pruned_in` found of a run's model.
    """

    def __init__(self, folder: Path, pruned: dict[str, Any] | None = None) -> None:
        from leap_dist.export.hf import load_exported, load_exported_tokenizer
        from leap_dist.models.pruned_folder import load_pruned
        from leap_dist.models.pruned_json import NAME

        self._model = load_pruned(folder) if (folder / NAME).is_file() else load_exported(folder)
        if pruned:
            _compute_as_run(self._model, pruned)
        self._tokenizer = load_exported_tokenizer(folder)

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """The logits of every row of a pandas table, (rows, ...); rows of ids have one length."""
        from leap_dist.export.latency import logits_of

        columns = {str(name): table[name].tolist() for name in table.columns}
        if self._tokenizer is not None:
            inputs = self._tokenizer(*columns.values(), padding=True, truncation=True, return_tensors="pt")
        else:
            inputs = {name: torch.tensor(rows) for name, rows in columns.items()}
        with torch.inference_mode():
            return logits_of(self._model(**inputs)).float().numpy()


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Served:
    """Called by MLflow, with what was saved as the model's config if there was any."""
    return Served(Path(path), model_config)
