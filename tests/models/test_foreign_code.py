"""Folders that bring code of their own, as a module, a pickle or a kernel's name: none of it is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.sections import ModelConfig
from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported, load_exported_tokenizer
from leap_dist.models.load import load_config, load_tokenizer
from leap_dist.models.pruned_folder import load_pruned
from leap_dist.tasks.tables import load_hub
from tests.export.runs import classifier
from tests.models.tiny import save_masked, tiny

pytestmark = pytest.mark.slow

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
class Config(BertConfig): model_type = "foreign"
class Model(BertForSequenceClassification): pass
class Tokenizer(BertTokenizerFast): pass
"""
MAP = {"AutoConfig": "foreign.Config", "AutoModelForSequenceClassification": "foreign.Model"}
TOKENIZERS = {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}
KERNEL = {"_attn_implementation": "someone/kernel"}
HUB = r'config\.json: \S+: got "someone/kernel", code of the hub, which is never run here; .* remove the key'
UNPICKLED = "cannot be loaded: UnpicklingError: Weights only load failed"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("saved") / "model"
    classifier().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the code makes, if it is run."""
    return tmp_path / "it was run"


@pytest.fixture
def folder(saved: Path, tmp_path: Path, mark: Path) -> Path:
    copy = Path(shutil.copytree(saved, tmp_path / "model"))
    (copy / "foreign.py").write_text(CODE.format(mark=str(mark)))
    return copy


class Pickled:
    """Makes `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def setting(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """A change of a JSON file."""

    def change(folder: Path, mark: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | values))

    return change


def pickled_weights(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Pickled(mark)}, folder / "pytorch_model.bin")


def raw_pickle(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(mark), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            setting("config.json", auto_map=MAP, model_type="foreign"),
            r"comes with code of its own \(auto_map\), which is",
        ),
        (setting("config.json", **KERNEL), HUB),
        (setting("config.json", attn_implementation={"text": "someone/kernel"}), HUB),
        (setting("config.json", text_config={"_experts_implementation": "someone/kernel"}), HUB),
        (setting("config.json", architectures=["pipeline"]), "cannot be loaded"),
        (pickled_weights, UNPICKLED),
        (raw_pickle, UNPICKLED),
    ],
)
def test_a_model_that_brings_code_is_refused(
    folder: Path, mark: Path, change: Callable[[Path, Path], None], message: str
) -> None:
    change(folder, mark)
    with pytest.raises(UserError, match=message):
        load_exported(folder)
    if change not in (pickled_weights, raw_pickle) and "loaded" not in message:
        with pytest.raises(UserError, match=message):
            load_config(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        setting("tokenizer_config.json", auto_map=TOKENIZERS, tokenizer_class="Tokenizer"),
        setting("tokenizer_config.json", auto_map=TOKENIZERS),
        setting("config.json", auto_map=MAP | TOKENIZERS),
        setting("processor_config.json", auto_map={"AutoProcessor": "foreign.Tokenizer"}),
        setting("generation_config.json", custom_generate="foreign"),
        lambda folder, mark: (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Pickled(mark))),
        lambda folder, mark: (folder / "training_args.bin").write_bytes(pickle.dumps(Pickled(mark))),
    ],
)
def test_what_stands_beside_a_model_is_not_run(
    folder: Path, mark: Path, change: Callable[[Path, Path], object]
) -> None:
    """Where transformers has a class of its own, that one is taken."""
    change(folder, mark)
    load_tokenizer(ModelConfig(name=str(folder)))
    assert load_exported_tokenizer(folder) is not None
    load_exported(folder)
    assert not mark.exists()


def test_a_shrunk_model_with_a_kernel_of_the_hub_is_refused(tmp_path: Path, mark: Path) -> None:
    save_masked(tiny("bert"), tmp_path / "model")
    setting("config.json", **KERNEL)(tmp_path / "model", mark)
    with pytest.raises(UserError, match=HUB):
        load_pruned(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.py", "train.pkl", "train.npy", "train.npz", "train.pt", "train.pickle"])
def test_data_that_bring_code_are_refused(tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    script = f"{CODE.format(mark=str(mark))}\nimport datasets\nclass Data(datasets.GeneratorBasedBuilder): pass\n"
    (folder / name).write_bytes(
        script.encode() if name.endswith("py") and name[-3] == "." else pickle.dumps(Pickled(mark))
    )
    with pytest.raises(UserError, match=r"data\.task: the dataset .* could not be loaded"):
        load_hub("data.task", str(folder), None)
    assert not mark.exists()
