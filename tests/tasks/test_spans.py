"""Spans against brute force; SQuAD's metrics against the published definitions, on the whole official dev set."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.tasks.spans import best_spans, choose_answer, n_best, normalised, squad_scores

# ------------------------------------------------------------------------------ spans


def brute_force(
    start: torch.Tensor, end: torch.Tensor, first: int, last: int, longest: int
) -> list[tuple[float, int, int]]:
    found = [
        ((start[a] + end[b]).item(), a, b)
        for a in range(first, last + 1)
        for b in range(a, min(last, a + longest - 1) + 1)
    ]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("longest", [1, 3, 50])
@pytest.mark.parametrize("num", [1, 7, 400])
def test_best_spans_are_those_of_brute_force(longest: int, num: int) -> None:
    start, end = torch.randn(3, 13, generator=torch.Generator().manual_seed(0)), torch.randn(3, 13)
    first, last = torch.tensor([0, 4, 12]), torch.tensor([12, 9, 12])
    scores, starts, ends = best_spans(start, end, first, last, longest, num)
    assert scores.shape == starts.shape == ends.shape == (3, num)
    for row in range(3):
        wanted = brute_force(start[row], end[row], int(first[row]), int(last[row]), longest)[:num]
        found = list(zip(scores[row].tolist(), starts[row].tolist(), ends[row].tolist(), strict=True))
        assert found[: len(wanted)] == wanted
        assert set(found[len(wanted) :]) <= {(-float("inf"), 0, 0)}  # no token behind the last one


def test_n_best_merges_equal_texts_and_skips_blanks() -> None:
    candidates = [(1.0, "b"), (3.0, " \n"), (2.0, "a"), (1.5, " a "), (0.0, "c")]
    assert n_best(candidates, 2) == [(2.0, "a"), (1.0, "b")]


@pytest.mark.parametrize(
    ("null", "threshold", "answer"),
    [(5.0, None, "a"), (2.4, 0.5, "a"), (2.6, 0.5, ""), (1.0, -2.0, ""), (1.0, 0.0, "a")],
)
def test_no_answer_is_given_beyond_the_threshold(null: float, threshold: float | None, answer: str) -> None:
    assert choose_answer([(2.0, "a"), (1.0, "b")], null, threshold) == answer
    assert choose_answer([], null, threshold) == ""


# ------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat's\tan-idea, THE end.", "cats anidea end"),
        ("a, an; the!", ""),
        ("theatre — 5%", "theatre — 5"),
        ("A.D.", "ad"),
    ],
)
def test_normalised(text: str, words: str) -> None:
    assert normalised(text) == words


@pytest.mark.parametrize(
    ("given", "true", "unanswerable", "exact", "f1"),
    [
        ("the Cat", ["dog", "cat"], False, 100, 100),
        ("black cat", ["a cat", "dog"], False, 0, 200 / 3),
        ("cat cat dog", ["cat dog dog"], False, 0, 200 / 3),
        ("", ["cat"], False, 0, 0),
        ("the", ["an"], False, 100, 0),  # 1.1 counts shared words, of which there are none
        ("the", ["an"], True, 100, 100),
        ("", [], True, 100, 100),
        ("cat", [], True, 0, 0),
        ("", ["cat"], True, 0, 0),
    ],
)
def test_one_question(given: str, true: list[str], unanswerable: bool, exact: float, f1: float) -> None:
    scores = squad_scores([given], [true], unanswerable)
    assert (scores["exact_match"], scores["f1"]) == pytest.approx((exact, f1))


def test_answerable_questions_are_told_apart() -> None:
    scores = squad_scores(["cat", "", "dog", ""], [["cat"], ["dog"], [], []], unanswerable=True)
    assert scores == {
        "exact_match": 50, "f1": 50, "has_answer_exact_match": 50, "has_answer_f1": 50,
        "no_answer_exact_match": 50, "no_answer_f1": 50,
    }  # fmt: skip


# ------------------------------------------------------------------------------ the whole dev set


def clean(text: str) -> str:
    """The published normalisation, step by step: lower case, punctuation, articles, white space."""
    letters = [letter for letter in text.lower() if letter not in string.punctuation]
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", "".join(letters)).split())


def shared_words(one: list[str], other: list[str]) -> int:
    rest, count = list(other), 0
    for word in one:
        if word in rest:
            rest.remove(word)
            count += 1
    return count


def published(data: dict[str, Any], predictions: dict[str, str], version: int) -> dict[str, float]:
    """Exact match and F1 of a prediction file, as the evaluations of SQuAD 1.1 (1) and 2.0 (2) are defined."""
    exact_sum = f1_sum = total = 0.0
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                true = [answer["text"] for answer in entry["answers"]]
                if version == 2:
                    true = [text for text in true if clean(text)] or [""]
                exact = f1 = 0.0
                for text in true:
                    ours, theirs = clean(predictions[entry["id"]]).split(), clean(text).split()
                    exact = max(exact, float(ours == theirs))
                    same = shared_words(ours, theirs)
                    if version == 2 and (not ours or not theirs):
                        f1 = max(f1, float(ours == theirs))
                    elif same:
                        precision, recall = same / len(ours), same / len(theirs)
                        f1 = max(f1, 2 * precision * recall / (precision + recall))
                total, exact_sum, f1_sum = total + 1, exact_sum + exact, f1_sum + f1
    return {"exact_match": 100 * exact_sum / total, "f1": 100 * f1_sum / total}


def predict(number: int, context: str, true: str) -> str:
    """A fixed prediction: by the question's number right, dressed up, cut, padded, elsewhere, or nothing."""
    rules = [
        true,
        f"The {true.upper()}, ",
        true.split()[0],
        f"{true} and {true}",
        context.split(".")[0],
        " ".join(context.split()[-4:]),
        ("", "the", "?!")[number % 3],
    ]
    return rules[number % len(rules)]


@pytest.fixture(scope="module")
def dev(data_dir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The official dev file of SQuAD 1.1, and a prediction for each question."""
    file = data_dir / "squad" / "dev-v1.1.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    data = json.loads(file.read_text("utf-8"))
    pairs = [
        (part["context"], entry) for article in data["data"] for part in article["paragraphs"] for entry in part["qas"]
    ]
    return data, {
        entry["id"]: predict(number, context, entry["answers"][number % len(entry["answers"])]["text"])
        for number, (context, entry) in enumerate(pairs)
    }


def entries(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for article in data["data"] for part in article["paragraphs"] for entry in part["qas"]]


def scores_of(data: dict[str, Any], predictions: dict[str, str], unanswerable: bool) -> dict[str, float]:
    true = [[answer["text"] for answer in entry["answers"]] for entry in entries(data)]
    return squad_scores([predictions[entry["id"]] for entry in entries(data)], true, unanswerable)


def test_the_whole_dev_set_as_published(dev: tuple[dict[str, Any], dict[str, str]]) -> None:
    data, predictions = dev
    assert len(predictions) == 10570
    scores = scores_of(data, predictions, unanswerable=False)
    assert scores == pytest.approx(published(data, predictions, 1), abs=1e-9)
    assert 30 < scores["exact_match"] < scores["f1"] < 70  # neither trivial


def test_the_whole_dev_set_with_questions_without_an_answer(dev: tuple[dict[str, Any], dict[str, str]]) -> None:
    data, predictions = dev
    data = json.loads(json.dumps(data))
    for entry in entries(data)[::3]:
        entry["answers"] = []
    scores = scores_of(data, predictions, unanswerable=True)
    assert {name: scores[name] for name in ("exact_match", "f1")} == pytest.approx(
        published(data, predictions, 2), abs=1e-9
    )
    parts = scores["has_answer_f1"] * 7046 + scores["no_answer_f1"] * 3524
    assert parts / 10570 == pytest.approx(scores["f1"])


def test_torchmetrics_agrees_on_a_part(dev: tuple[dict[str, Any], dict[str, str]]) -> None:
    """Where words are left: with none, torchmetrics judges 1.1 as 2.0 does. It sums in float32."""
    from torchmetrics.text import SQuAD

    data, predictions = dev
    chosen = [
        e for e in entries(data)[:700] if clean(predictions[e["id"]]) and all(clean(a["text"]) for a in e["answers"])
    ]
    metric = SQuAD()
    metric.update(
        [{"id": e["id"], "prediction_text": predictions[e["id"]]} for e in chosen],
        [{"id": e["id"], "answers": {"text": [a["text"] for a in e["answers"]]}} for e in chosen],
    )
    ours = squad_scores(
        [predictions[e["id"]] for e in chosen], [[a["text"] for a in e["answers"]] for e in chosen], False
    )
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(ours, abs=1e-3)
