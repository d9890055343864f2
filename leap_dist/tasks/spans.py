"""Answers as spans of a text: the best spans of a window, and SQuAD's exact match and F1.

The metrics follow the definitions published with SQuAD 1.1 and 2.0. Both compare normalised texts: lower case, no ASCII
punctuation, no articles, single spaces. Exact match is equality, F1 the harmonic mean of the parts of predicted and of
true words that are shared, and a question's value is the best over its true answers; a mean over questions, in percent.
Of 1.1 and 2.0 the latter alone has questions without an answer: "" is right for them, and texts without any word left
are equal to it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def best_spans(
    start: Tensor, end: Tensor, first: Tensor, last: Tensor, longest: int, num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, start tokens, end tokens), each (batch, num), of the best spans of at most `longest` tokens, best first.

    start, end: logits (batch, length); spans lie in tokens first to last, each (batch,). score = start + end logit;
    -inf where there are fewer spans than `num`, which start and end at token 0 then.
    """
    position = torch.arange(start.shape[1], device=start.device)
    outside = (position < first[:, None]) | (position > last[:, None])
    start, end = start.masked_fill(outside, -torch.inf), end.masked_fill(outside, -torch.inf)
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (batch, length, longest)
    scores = (start[:, :, None] + ends).flatten(1)
    top = scores.topk(min(num, scores.shape[1]))
    real = top.values > -torch.inf  # those outside may end behind the last token
    starts = (top.indices // longest) * real
    ends = starts + (top.indices % longest) * real
    missing = (0, num - top.values.shape[1])
    found = F.pad(starts, missing), F.pad(ends, missing)
    return F.pad(top.values, missing, value=-torch.inf), *found


def normalised(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]], unanswerable: bool) -> dict[str, float]:
    """exact_match and f1 in percent, of one prediction for each question; answers: the true ones, by question.

    unanswerable: SQuAD 2.0, with has_answer_f1, no_answer_f1, ... beside them where there are such questions.
    """
    values = [_judge(given, true, unanswerable) for given, true in zip(predictions, answers, strict=True)]
    groups: dict[str, list[tuple[float, float]]] = {"": values}
    if unanswerable:
        groups["has_answer_"] = [value for value, true in zip(values, answers, strict=True) if true]
        groups["no_answer_"] = [value for value, true in zip(values, answers, strict=True) if not true]
    return {
        f"{prefix}{name}": 100.0 * sum(value[which] for value in group) / len(group)
        for prefix, group in groups.items()
        for which, name in enumerate(("exact_match", "f1"))
        if group
    }


def _judge(given: str, answers: Sequence[str], unanswerable: bool) -> tuple[float, float]:
    """(exact match, F1) of one question, 0 to 1."""
    prediction, true = normalised(given), [normalised(answer) for answer in answers]
    if unanswerable:
        true = [answer for answer in true if answer] or [""]
    exact = max(float(prediction == answer) for answer in true)
    return exact, max(_f1(prediction.split(), answer.split(), unanswerable) for answer in true)


def _f1(predicted: list[str], true: list[str], unanswerable: bool) -> float:
    """Of two lists of words. In SQuAD 2.0 two empty ones agree."""
    if unanswerable and not (predicted and true):
        return float(predicted == true)
    shared = (Counter(predicted) & Counter(true)).total()
    return 2.0 * shared / (len(predicted) + len(true)) if shared else 0.0


def n_best(candidates: Sequence[tuple[float, str]], num: int) -> list[tuple[float, str]]:
    """The `num` best different texts that are not blank, best first; candidates: (score, text) in any order."""
    best: dict[str, float] = {}
    for score, text in sorted(candidates, key=lambda found: -found[0]):
        if text.strip():
            best.setdefault(text.strip(), score)
    return [(score, text) for text, score in best.items()][:num]


def choose_answer(best: Sequence[tuple[float, str]], null_score: float, threshold: float | None) -> str:
    """The answer to a question: the best text, or "" where "no answer" scores higher by more than `threshold`.

    best: from `n_best`; threshold: None where every question has an answer.
    """
    if not best or (threshold is not None and null_score - best[0][0] > threshold):
        return ""
    return best[0][1]
