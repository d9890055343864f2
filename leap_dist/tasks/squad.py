"""SQuAD 1.1 and 2.0, or data in their form: the answer to a question is a span of a text, or (2.0) there is none.

A long text is cut into windows that overlap; each holds the whole question. A window without the answer, and every
window of a question without one, answers with its first token. Of all windows of a question the best span wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.config.section import is_int, show
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.base import Batch, Collator, Task, TokenTable, flat, joined, pad_id, tokenised
from leap_dist.tasks.cache import Arrays, cached
from leap_dist.tasks.files import files_of, kind_of, read_text, reading
from leap_dist.tasks.spans import best_spans, choose_answer, n_best, squad_scores
from leap_dist.tasks.tables import TABLES, cell_text, hub_column, hub_split, load_hub, split_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SQUAD, SQUAD_V2 = "squad", "squad_v2"
HUB_DATASETS = {SQUAD: "rajpurkar/squad", SQUAD_V2: "rajpurkar/squad_v2"}
NAMES = tuple(HUB_DATASETS)
TOKENIZE_ROWS = 200
"""Questions that the tokenizer sees at once: bounds the memory of its answer."""
FORMAT = "2"
"""Changes with what the arrays of windows mean."""
LABELS = ("start_positions", "end_positions")
CONTEXT = ("context_start", "context_end")
"""First and last token of a window that belong to the text."""


@dataclass(frozen=True)
class Question:
    """A question about a text; answers: (text, first character), none where there is no answer."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task from the hub, or from what `data` names: official JSON files, or another dataset."""
    if not tokenizer.is_fast:
        raise UserError(f"model.name: its tokenizer does not say where tokens are in the text; {data.task} needs that")
    train_questions, questions = _questions(data)
    train, validation = (_windows(part, tokenizer, data) for part in (train_questions, questions))
    pad = pad_id(tokenizer)
    longest = max(train.longest, validation.longest)
    kept = {key: train.columns[key] for key in train.columns if not key.startswith("char_")}
    labels = {key: train.numbers[key] for key in LABELS}
    return Task(
        name=data.task,
        num_labels=2,
        train=TokenTable({**kept, "starts": train.starts}, **labels),
        validation={"validation": validation},
        collate=Collator(pad, dict.fromkeys((*LABELS, *CONTEXT), torch.int64)),
        evaluation=SpanEvaluation(data, questions, validation),
        primary="f1",
        problem="question_answering",
        label_names=(),
        vocab_size=len(tokenizer),
        max_length=longest,
        pad_id=pad,
    )


@dataclass(frozen=True)
class SpanEvaluation:
    """Answers as spans; `windows` are those of `questions`, with char_start and char_end of each token."""

    data: DataConfig
    questions: Sequence[Question]
    windows: TokenTable

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Of each window scores, starts and ends (batch, n_best), the score of no answer and the loss (batch,)."""
        output = model(**{key: value for key, value in batch.items() if key not in (*LABELS, *CONTEXT)})
        start, end = output.start_logits.float(), output.end_logits.float()
        first, last = (batch[key] for key in CONTEXT)
        scores, starts, ends = best_spans(start, end, first, last, self.data.max_answer_length, self.data.n_best)
        losses = [
            F.cross_entropy(logits, batch[key], reduction="none")
            for logits, key in zip((start, end), LABELS, strict=True)
        ]
        null = start[:, 0] + end[:, 0]
        return {"scores": scores, "starts": starts, "ends": ends, "null": null, "loss": sum(losses) / 2}

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        """exact_match and f1 over questions, and the mean loss over windows."""
        unanswerable = self.data.task == SQUAD_V2
        threshold = self.data.null_score_threshold if unanswerable else None
        predictions = [choose_answer(best, null, threshold) for best, null in self.answers(kept)]
        true = [[text for text, _ in question.answers] for question in self.questions]
        return squad_scores(predictions, true, unanswerable) | {"loss": kept["loss"].mean().item()}

    def answers(self, kept: Mapping[str, Tensor]) -> list[tuple[list[tuple[float, str]], float]]:
        """For each question its best answers over all windows, (score, text), and the score of no answer."""
        token = torch.from_numpy(self.windows.starts[:-1])[:, None]
        chars = (("char_start", "starts"), ("char_end", "ends"))
        begin, stop = (self.windows.columns[column][token + kept[key]].tolist() for column, key in chars)
        scores, nulls = kept["scores"].tolist(), kept["null"].tolist()
        spans: list[list[tuple[float, str]]] = [[] for _ in self.questions]
        no_answer = [float("inf")] * len(self.questions)
        for window, number in enumerate(self.windows.numbers["question"].tolist()):
            text = self.questions[number].context
            found = zip(scores[window], begin[window], stop[window], strict=True)
            spans[number] += [(score, text[a:b]) for score, a, b in found if score > -float("inf")]
            no_answer[number] = min(no_answer[number], nulls[window])
        return [(n_best(found, self.data.n_best), null) for found, null in zip(spans, no_answer, strict=True)]


# ---------------------------------------------------------------------------------------------- windows


def _windows(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> TokenTable:
    """All windows: tokens, with the characters of the text that each stands for; numbers: LABELS, CONTEXT, question."""

    def make() -> Arrays:
        parts = [
            _window_arrays(questions, start, tokenizer, data.max_length, data.shared_tokens)
            for start in range(0, len(questions), TOKENIZE_ROWS)
        ]
        numbers = {key: np.concatenate([part.pop(key) for part in parts]) for key in (*LABELS, *CONTEXT, "question")}
        return {**joined(parts), **numbers}

    arrays = dict(cached(tokenizer, (FORMAT, data.task, data.max_length, data.shared_tokens, *questions), make))
    numbers = {key: arrays.pop(key) for key in (*LABELS, *CONTEXT, "question")}
    return TokenTable(arrays, **numbers)


def _window_arrays(
    questions: Sequence[Question], start: int, tokenizer: PreTrainedTokenizerBase, max_length: int, shared: int
) -> Arrays:
    """Columns, "starts" and numbers of the windows of TOKENIZE_ROWS questions from `start` on."""
    part = questions[start : start + TOKENIZE_ROWS]
    encoded = tokenised(
        tokenizer,
        _cut([question.question for question in part], tokenizer, max_length // 3),
        [question.context for question in part],
        truncation="only_second",
        max_length=max_length,
        stride=shared,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owner = encoded.pop("overflow_to_sample_mapping")
    offsets = [np.array(row) for row in encoded.pop("offset_mapping")]
    rows = []
    for window, (number, chars) in enumerate(zip(owner, offsets, strict=True)):
        sides = encoded.sequence_ids(window)
        if 1 not in sides:
            problem = "the tokenizer keeps no character of its text"
            raise UserError(f"data.train, data.validation: question {part[number].id}: {problem}; remove it")
        first, last = sides.index(1), len(sides) - 1 - sides[::-1].index(1)
        chars[:first] = chars[last + 1 :] = 0
        rows.append((*_answer_tokens(part[number].answers, chars, first, last), first, last, start + number))
    numbers = dict(zip((*LABELS, *CONTEXT, "question"), np.array(rows, dtype=np.int32).T, strict=True))
    chars_of = {name: [chars[:, side] for chars in offsets] for side, name in enumerate(("char_start", "char_end"))}
    return flat({**encoded, **chars_of}) | {key: np.ascontiguousarray(values) for key, values in numbers.items()}


def _answer_tokens(answers: Sequence[tuple[str, int]], chars: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if it does not lie in the window, or there is none.

    chars: (tokens, 2), the characters from and to of each token.
    """
    if not answers:
        return 0, 0
    text, begin = answers[0]
    begin += len(text) - len(text.lstrip())  # of white space at the edges of a text there may be no tokens
    stop = begin + len(text.strip())
    if begin < chars[first, 0] or stop > chars[last, 1]:
        return 0, 0
    start = first + int(np.searchsorted(chars[first : last + 1, 1], begin, side="right"))
    end = first + int(np.searchsorted(chars[first : last + 1, 0], stop, side="left")) - 1
    return start, max(start, end)


def _cut(questions: list[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """The questions, cut to at most `longest` tokens so that windows have room for the text."""
    encoded = tokenised(tokenizer, questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [offsets[longest - 1][1] if len(offsets) > longest else None for offsets in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(questions, ends, strict=True)]


# ---------------------------------------------------------------------------------------------- reading


def _questions(data: DataConfig) -> tuple[list[Question], list[Question]]:
    """Train and validation."""
    if data.dataset or not data.train:
        name, key = data.dataset or HUB_DATASETS[data.task], "data.dataset" if data.dataset else "data.task"
        splits = load_hub(key, name, data.subset)
        found = [
            (f"{name} {split}", list(_hub_questions(hub_split(splits, setting, split), f"{name} {split}")))
            for setting, split in split_names(data)
        ]
    else:
        found = [
            (
                f"{key}: {', '.join(given)}",
                [row for file in files_of(key, given) for row in official_questions(key, file)],
            )
            for key, given in (("data.train", data.train), ("data.validation", data.validation or ()))
        ]
    for source, questions in found:
        _check(source, questions, data.task)
    return found[0][1], found[1][1]


def _hub_questions(rows: Any, source: str) -> Iterator[Question]:
    columns = [hub_column(rows, "data.dataset", name) for name in ("id", "question", "context", "answers")]
    for row, (name, question, context, answers) in enumerate(zip(*columns, strict=True), start=1):
        try:
            pairs = zip(answers["text"], answers["answer_start"], strict=True)
            yield _question(source, str(name), question, context, list(pairs))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            problem = f'got {str(answers)[:60]}; allowed: {{"text": [...], "answer_start": [...]}}, equally many'
            raise UserError(f'{source}: row {row}, column "answers": {problem}') from error


def official_questions(key: str, file: Path) -> Iterator[Question]:
    """The questions of a JSON file as SQuAD publishes them; `key` is the setting that names it."""
    if kind_of(file) in TABLES and kind_of(file) != ".json":
        raise UserError(
            f"{key}: got {file}; allowed: official SQuAD JSON; for rows with the columns id, question, context and "
            "answers, name their folder in data.dataset"
        )
    content = read_text(key, file)
    with reading(key, file):
        content = json.loads(content)
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = _answers(f"{file}: question {entry['id']}", entry)
                    yield _question(str(file), str(entry["id"]), entry["question"], paragraph["context"], answers)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{key}: {file}: not a SQuAD file: {error}; allowed: {{"data": [{{"paragraphs": [{{"context": ..., "qas": '
            '[{"id": ..., "question": ..., "answers": [{"text": ..., "answer_start": ...}]}]}]}]}'
        ) from error


def _question(source: str, name: str, question: Any, context: Any, answers: Sequence[tuple[Any, Any]]) -> Question:
    """A question whose parts are text and numbers."""
    place = f"{source}: question {name}"
    texts = [cell_text(value, place, column) for value, column in ((question, "question"), (context, "context"))]
    if wrong := [begin for _, begin in answers if not is_int(begin)]:
        raise UserError(f"{place}: got {wrong[0]!r} as answer_start; allowed: an integer")
    found = tuple((cell_text(text, place, "answers"), begin) for text, begin in answers)
    return Question(name, texts[0].strip(), texts[1], found)


def _answers(place: str, entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The answers of a question, none where it is marked as impossible."""
    impossible, answers = entry.get("is_impossible", False), entry.get("answers") or []
    if not isinstance(impossible, bool):
        raise UserError(f"{place}: is_impossible: got {show(impossible)}; allowed: true or false, or no such key")
    if impossible and answers:
        raise UserError(f'{place}: has answers, and "is_impossible": true; remove the answers, or make it false')
    if not impossible and not answers:
        raise UserError(
            f"{place}: no answers; a file to train or to judge with holds them; questions without an answer are "
            'marked "is_impossible": true and are for "task": "squad_v2"'
        )
    return [(answer["text"], answer["answer_start"]) for answer in answers]


def _check(source: str, questions: Sequence[Question], task: str) -> None:
    """There are questions, and each answer stands where it says."""
    if not questions:
        raise UserError(f"{source}: no questions in it")
    for question in questions:
        if not question.answers and task == SQUAD:
            problem = f"question {question.id} has no answer"
            raise UserError(f'{source}: {problem}; allowed: one or more, or "task": "{SQUAD_V2}"')
        if not question.context.strip() or not question.question:
            raise UserError(f"{source}: question {question.id}: its question or its text is empty")
        for text, begin in question.answers:
            there = question.context[begin : begin + len(text)] if begin >= 0 else ""
            if not text.strip():
                raise UserError(
                    f"{source}: question {question.id}: an answer is empty, or white space alone; remove it"
                )
            if there != text:
                problem = f'question {question.id}: answer "{text[:40]}" at character {begin}'
                raise UserError(f'{source}: {problem}: the text reads "{there[:40]}" there')
