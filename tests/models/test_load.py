"""Loading models: from a config, from a folder, and every way in which that goes wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

from leap_dist.config.sections import ModelConfig
from leap_dist.errors import UserError
from leap_dist.models.load import auto_class, load_model, load_tokenizer
from leap_dist.tasks.base import Collator, Problem, Task
from leap_dist.tasks.metrics import LabelEvaluation

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
GPT2 = {key: value for key, value in TINY.items() if key != "intermediate_size"}


def make_task(num_labels: int = 3, problem: Problem = "single_label_classification") -> Task:
    names = tuple(f"class {i}" for i in range(num_labels))
    evaluation = LabelEvaluation(("accuracy",), num_labels)
    return Task("tiny", num_labels, [], {}, Collator(0, {}), evaluation, "accuracy", problem, names, 20, 12)


def from_config(**changes: Any) -> ModelConfig:
    return ModelConfig(from_config={"model_type": "bert", **TINY, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bare encoder, as pretraining leaves it: no head."""
    torch.manual_seed(1)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


# ------------------------------------------------------------------------------ loaded


def test_from_config_is_fp32_and_knows_the_labels() -> None:
    model = load_model(from_config(dtype="bfloat16"), make_task())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert model.config.label2id == {"class 0": 0, "class 1": 1, "class 2": 2}
    assert model.config.problem_type == "single_label_classification"
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 3)


def test_the_generator_decides_random_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(load_model(from_config(), make_task()).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_regression_has_one_output() -> None:
    model = load_model(from_config(), make_task(1, "regression"))
    output = model(torch.tensor([[1, 2]]), labels=torch.tensor([2.0]))
    assert output.logits.shape == (1, 1)
    assert output.loss.item() == pytest.approx((output.logits.item() - 2.0) ** 2)


def test_a_folder_gives_its_encoder_and_a_new_head(folder: Path) -> None:
    model = load_model(ModelConfig(name=str(folder)), make_task())
    stored = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in model.base_model.state_dict().items())
    assert model.state_dict()["classifier.weight"].shape == (3, 8)


def test_weights_stored_in_bf16_are_loaded_in_fp32(folder: Path) -> None:
    AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    model = load_model(ModelConfig(name=str(folder)), make_task())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_fitting_head_is_kept_and_another_is_made_anew(folder: Path, tmp_path: Path) -> None:
    trained = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    trained.save_pretrained(tmp_path / "trained")
    stored = trained.state_dict()
    model = ModelConfig(name=str(tmp_path / "trained"))
    assert torch.equal(load_model(model, make_task(3)).state_dict()["classifier.weight"], stored["classifier.weight"])
    other = load_model(model, make_task(2)).state_dict()
    assert other["classifier.weight"].shape == (2, 8)
    assert torch.equal(other["bert.pooler.dense.weight"], stored["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("problem", "kind", "shape"),
    [
        ("question_answering", "bert", (1, 2)),
        ("masked_lm", "bert", (1, 2, 20)),
        ("causal_lm", "gpt2", (1, 2, 20)),
        ("causal_lm", "llama", (1, 2, 20)),
    ],
)
def test_the_head_fits_the_problem(problem: Problem, kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """From a config, and from the folder of a classifier with another number of labels."""
    task = dataclasses.replace(make_task(2, problem), label_names=())
    sizes = GPT2 if kind == "gpt2" else TINY
    sizes = {**sizes, "tie_word_embeddings": True}  # a head of its own would be random
    torch.manual_seed(1)
    made = load_model(ModelConfig(from_config={"model_type": kind, **sizes}), task)
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes, num_labels=5)).save_pretrained(
        tmp_path
    )
    for model in (made, load_model(ModelConfig(name=str(tmp_path)), task)):
        output = model(torch.tensor([[1, 2]]))
        logits = output.start_logits if problem == "question_answering" else output.logits
        assert logits.shape == shape
        assert isinstance(model, auto_class(problem)._model_mapping[type(model.config)])


def test_a_decoder_that_classifies_learns_which_token_pads() -> None:
    task = dataclasses.replace(make_task(), pad_id=7)
    model = load_model(ModelConfig(from_config={"model_type": "gpt2", **GPT2}), task).eval()
    assert model.config.pad_token_id == 7
    padded = model(torch.tensor([[1, 2], [3, 7]]), attention_mask=torch.tensor([[1, 1], [1, 0]])).logits
    assert torch.allclose(padded[1], model(torch.tensor([[3]])).logits[0], atol=1e-6)
    assert load_model(from_config(pad_token_id=2), task).config.pad_token_id == 7


# ------------------------------------------------------------------------------ refused

REFUSED = {
    "unknown architecture": (
        ModelConfig(from_config={"model_type": "brt"}),
        r'model\.from_config\.model_type: got "brt", which transformers does not know; did you mean bert\?',
    ),
    "unknown key": (
        from_config(hiden_size=8),
        r"model\.from_config\.hiden_size: a bert config has no such key; did you mean hidden_size\?",
    ),
    "heads do not divide": (
        from_config(num_attention_heads=3),
        r"model\.from_config: transformers refuses it: .*8",
    ),
    "wrong type": (from_config(hidden_size="big"), r"model\.from_config: transformers refuses it"),
    "unknown dtype": (
        from_config(dtype="torch.bf16"),
        r"model\.from_config: transformers refuses it: Attr.*torch\.bf16",
    ),
    "unknown activation": (from_config(hidden_act="relo"), r"model\.from_config: transformers refuses it"),
    "small vocabulary": (
        from_config(vocab_size=19),
        r"model: vocab_size is 19; allowed: at least 20, tiny has 20",
    ),
    "few positions": (
        from_config(max_position_embeddings=11),
        r"model: max_position_embeddings is 11; allowed",
    ),
    "no folder": (ModelConfig(name="./nowhere"), r'model\.name: got "\./nowhere"; there is no such folder'),
    "a deep path": (ModelConfig(name="a/b/c"), r'model\.name: got "a/b/c"; there is no such folder'),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(model, make_task())


def test_a_longer_example_than_the_model_takes() -> None:
    hint = "tiny has 12 tokens in its longest example; or set data.max_length to what the model has"
    with pytest.raises(UserError, match=f"model: max_position_embeddings is 11; allowed: at least 12, {hint}"):
        load_model(from_config(max_position_embeddings=11), make_task())
    roberta = {"model_type": "roberta", **TINY, "pad_token_id": 1}
    with pytest.raises(UserError, match="model: max_position_embeddings is 11; allowed: at least 12"):
        load_model(ModelConfig(from_config={**roberta, "max_position_embeddings": 13}), make_task())
    model = load_model(ModelConfig(from_config={**roberta, "max_position_embeddings": 14}), make_task())
    assert model(torch.full((1, 12), 5)).logits.shape == (1, 3)


def test_a_model_that_reads_both_ways_is_no_causal_one() -> None:
    task = dataclasses.replace(make_task(2, "causal_lm"), label_names=())
    with pytest.raises(UserError, match=r'data\.task: got "tiny", but a bert model is bidirectional; .*"task": "mlm"'):
        load_model(from_config(), task)
    load_model(from_config(is_decoder=True), task)


def test_a_head_that_an_architecture_does_not_have() -> None:
    task = dataclasses.replace(make_task(2, "masked_lm"), label_names=())
    with pytest.raises(UserError, match=r"model\.from_config: transformers refuses it: .*AutoModelForMaskedLM"):
        load_model(ModelConfig(from_config={"model_type": "gpt2", **GPT2}), task)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load_model(ModelConfig(name=str(folder / "config.json")), make_task())


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.name: .*that folder has no config\.json"):
        load_model(ModelConfig(name=str(folder)), make_task())


def test_a_folder_with_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.name: .*its model cannot be loaded"):
        load_model(ModelConfig(name=str(folder)), make_task())


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.name: .*that folder has no weights"):
        load_model(ModelConfig(name=str(folder)), make_task())


def test_weights_of_another_shape(folder: Path) -> None:
    config = BertConfig(**{**TINY, "hidden_size": 12})
    config.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"bert\.embeddings\.LayerNorm\.bias \(\(8,\), not \(12,\)\).* of another shape"
    ):
        load_model(ModelConfig(name=str(folder)), make_task(2))


def test_weights_of_another_architecture(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"none of its weights fit its config\.json, a bert model"):
        load_model(ModelConfig(name=str(folder)), make_task())


def test_a_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoConfig

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match=r'got "someone/model"; its model cannot be loaded: We couldn.t connect'):
        load_model(ModelConfig(name="someone/model"), make_task())


def test_tokenizer_of_a_config() -> None:
    with pytest.raises(UserError, match=r"model\.from_config: has no tokenizer; give data\.tokenizer, or model\.name"):
        load_tokenizer(from_config())


def test_tokenizer_of_a_broken_folder(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.name: .*its tokenizer cannot be loaded"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_tokenizer_of_a_folder_without_one(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.name: .*that folder has no tokenizer \(tokenizer\.json or vocab\.txt\)"
    ):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_tokenizer_of_a_folder(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    made.save_pretrained(folder)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    assert (tokenizer("a")["input_ids"], tokenizer.pad_token_id) == ([2], 0)
    (folder / "config.json").unlink()  # beside a model of its own, a tokenizer needs none
    assert load_tokenizer(from_config(), str(folder))("a")["input_ids"] == [2]
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"model\.name: .*there is no such folder"):
        load_tokenizer(ModelConfig(name=str(folder)))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*there is no such folder"):
        load_tokenizer(from_config(), str(folder))


# ------------------------------------------------------------------------------ files that are not what they should be

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("file", "break_", "message"),
    [
        (
            "model.safetensors",
            lambda file: file.write_bytes(POINTER),
            r"safetensors there is a pointer of Git LFS",
        ),
        ("model.safetensors", cut, r"cannot be loaded: SafetensorError: .*"),
        ("model.safetensors", lambda file: file.write_bytes(b"\xff" * 64), r"cannot be loaded: SafetensorError: .*"),
        ("model.safetensors", lambda file: file.write_bytes(b""), r"cannot be loaded: SafetensorError: .*"),
        ("config.json", lambda file: file.write_text("[]"), r"cannot be loaded: "),
        ("config.json", lambda file: file.write_text('{"model_type": "bert", "hidden_size": "x"}'), "cannot be loaded"),
    ],
)
def test_a_broken_file_is_said_in_the_causes_words(file: str, break_: Any, message: str, folder: Path) -> None:
    break_(folder / file)
    with pytest.raises(UserError, match=rf'^model\.name: got ".*"; .*{message}'):
        load_model(ModelConfig(name=str(folder)), make_task())


class Boom:
    """A pickle that would make a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_code_of_a_pickle_is_run(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": Boom(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.name: .*cannot be loaded: .*[Ww]eights.only"):
        load_model(ModelConfig(name=str(folder)), make_task())
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"^model\.name: .*cannot be loaded: "):
        load_model(ModelConfig(name=str(folder)), make_task())
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_that_comes_with_a_model_is_never_run(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the user asked: a prompt would wait on a terminal, and end in EOFError without one."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    code = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M", "AutoTokenizer": ["own.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "homemade", "auto_map": code}))
    refusal = rf"its {what} comes with code of its own \(auto_map\), which is never run here; .*; use a version"
    with pytest.raises(UserError, match=refusal.replace("its config", "its (config|model)")):
        if what == "tokenizer":
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": code}))
            load_tokenizer(ModelConfig(name=str(folder)))
        else:
            load_model(ModelConfig(name=str(folder)), make_task())
    assert not (folder / "ran").exists()


def test_home_is_meant_by_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    model = ModelConfig(name=f"~/{folder.name}")
    assert model.name == str(folder)
    load_model(model, make_task())


# ------------------------------------------------------------------------------ numbers that are no weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to(torch.int8), r"query\.weight is stored as I8, quantised; allowed: weights in bf16"),
        (lambda weight: weight.to(torch.float8_e4m3fn), r"query\.weight is stored as F8_E4M3, quantised"),
        (
            lambda weight: weight * torch.nan,
            r"values of bert\.encoder\.layer\.0\.\S*query\.weight are NaN or infinite",
        ),
    ],
)
def test_numbers_that_are_no_weights(change: Any, message: str, folder: Path) -> None:
    """Integers would be read as weights without their scale, NaN would be trained."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(name=str(folder)), make_task())


def test_masks_in_bytes_that_older_versions_saved_are_no_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["encoder.layer.0.attn.bias"] = mask
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelConfig(name=str(folder)), make_task())


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", "of a later version"])
def test_a_quantised_model(method: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"config\.json has a quantization_config \({method}\); allowed: weights in"):
        load_model(ModelConfig(name=str(folder)), make_task())
