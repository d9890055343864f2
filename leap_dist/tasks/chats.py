"""Conversations, as the tokenizer's chat template writes them; a loss on the answers alone.

Which tokens are an answer's: a template that says so ({% generation %}) is asked. Of others the text up to an answer,
with the prompt for one, and the text behind it have to be the beginning of the whole. Where a template writes earlier
turns in another way than when they were answered (Qwen3 drops their thoughts), every answer is an example of its own,
in the text that the model answers in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from leap_dist.config.section import show
from leap_dist.errors import UserError
from leap_dist.ops.words import IGNORED
from leap_dist.tasks.base import Example, TokenTable, flat, tokenised
from leap_dist.tasks.cache import cached
from leap_dist.tasks.tables import cell_text, check_letters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = "assistant"
TOOLS = "tools"  # the column beside a conversation with the functions that may be called in it
WEIGHT = "weight"  # of an answer: 0 where it is not to be learned
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template has where answers begin, if it says so."""

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with at least one answer; `place`: where the row stands; `tools`: functions that may be called."""

    place: str
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    given: int = 0
    """Messages of the prompt: their answers are not learned, as those of WEIGHT 0."""

    @property
    def learned(self) -> list[int]:
        """Where the answers stand that are learned."""
        return [place for place in self.answers if place >= self.given and self.messages[place].get(WEIGHT, 1)]

    @property
    def answers(self) -> list[int]:
        """Where all answers stand."""
        return [place for place, message in enumerate(self.messages) if message["role"] == ANSWERS]


def read_messages(value: Any, place: str, column: str) -> tuple[Message, ...]:
    """The messages in a cell. UserError for what is no list of {"role": ..., "content": ...}."""
    where = f'{place}, column "{column}"'
    if not isinstance(value, list) or not value:
        received = "an empty list" if value == [] else str(value)[:40]
        raise UserError(f'{where}: got {received}; allowed: a list of messages, {{"role": ..., "content": ...}}')
    return tuple(_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1))


def _message(value: Any, where: str) -> Message:
    """A message without the keys that hold nothing: a table has the same keys in all of a column."""
    if not isinstance(value, Mapping) or "role" not in value:
        raise UserError(f'{where}: got {str(value)[:60]}; allowed: {{"role": ..., "content": ...}}')
    found = {key: part for key, part in value.items() if part is not None}
    for key, part in found.items():
        _check_strings([key, part], f"{where}: {key}")
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: role: got {str(role)[:40]}; allowed: {', '.join(ROLES)}")
    calls = role == ANSWERS and found.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        received = "nothing" if content is None else str(content)[:40]
        raise UserError(f"{where}: content: got {received}; allowed: text")
    if role == ANSWERS and not calls and not str(content).strip():
        raise UserError(f"{where}: an answer without text; remove the row, or give the answer")
    if role == ANSWERS and found.get(WEIGHT, 1) not in (0, 1):
        raise UserError(f"{where}: {WEIGHT}: got {show(found[WEIGHT])}; allowed: 1, or 0: it is not learned")
    return found


def _check_strings(value: Any, where: str) -> None:
    """Every string in a value, at any depth, is text: a template may write any of them."""
    if isinstance(value, str):
        check_letters(value, where)
    elif isinstance(value, Mapping | list | tuple):
        for part in chain(value, value.values()) if isinstance(value, Mapping) else value:
            _check_strings(part, where)


def conversation(row: Mapping[str, Any], place: str, columns: Sequence[str]) -> Conversation:
    """One column: messages. Two: the prompt and the answer, each text or messages; three: an input behind the prompt.

    What follows the last answer is left out: nothing is learned from it. A column TOOLS beside goes to the template.
    """
    asked: tuple[Message, ...] = ()
    if len(columns) == 1:
        messages = read_messages(row.get(columns[0]), place, columns[0])
    else:
        prompt, *context, answer = ((row.get(column), column) for column in columns)
        given = [(value, column) for value, column in context if value is not None and value != ""]
        added = "".join(f"\n\n{cell_text(value, place, column)}" for value, column in given)
        asked = _part(*prompt, place, "user", added)
        messages = (*asked, *_part(*answer, place, ANSWERS))
    found = Conversation(place, messages, _tools(row.get(TOOLS), place), len(asked))
    if not found.learned:
        roles = ", ".join(message["role"] for message in messages[len(asked) :])
        problem = f"no answer, the messages are of {roles}; allowed: at least one of {ANSWERS}"
        if any(place >= len(asked) for place in found.answers):
            problem = f"no answer to learn, {WEIGHT} is 0 in all; allowed: at least one of 1"
        raise UserError(f'{place}, column "{columns[-1]}": {problem}')
    return replace(found, messages=messages[: found.learned[-1] + 1])


def _tools(value: Any, place: str) -> tuple[Any, ...]:
    where = f'{place}, column "{TOOLS}"'
    if value is not None and not isinstance(value, list):
        raise UserError(f"{where}: got {str(value)[:40]}; allowed: a list of functions, or nothing")
    _check_strings(value, where)
    return tuple(value or ())


def _part(value: Any, column: str, place: str, role: str, added: str = "") -> tuple[Message, ...]:
    if isinstance(value, list):
        if added:
            raise UserError(f'{place}, column "{column}": messages, which an input cannot follow; allowed there: text')
        return read_messages(value, place, column)
    text = cell_text(value, place, column)
    if role == ANSWERS and not text.strip():
        raise UserError(f'{place}, column "{column}": an answer without text; remove the row, or give the answer')
    return ({"role": role, "content": text + added},)


# ---------------------------------------------------------------------------------------------- tokens


class ChatEncoder:
    """Conversations as examples of at most `max_length` tokens; labels are IGNORED but for answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        if not tokenizer.chat_template:
            raise UserError(
                "data.train: has conversations, and the tokenizer has no chat template; allowed: the tokenizer of an "
                "instruction model in data.tokenizer, a chat_template.jinja in its folder, or data.text with a column "
                "of plain text"
            )
        if not tokenizer.is_fast:
            raise UserError(
                "data.train: has conversations, and the tokenizer does not say where tokens are in the text; allowed: "
                "a fast tokenizer (tokenizer.json)"
            )
        self.cut = self.lost = 0  # conversations that max_length has cut; those of them that have no answer then

    def encode(self, row: Conversation) -> list[Example]:
        """One example; one an answer where the template rewrites earlier turns; none of what max_length cuts off."""
        if MARKED.search(self._template(row)):
            pairs = [self._marked(row)]
        else:
            pairs = [self._tokens(text, spans) for text, spans in self._texts(row)]
        found = [example for pair in pairs if (example := self._example(row, *pair)) is not None]
        self.cut += any(len(ids) > self._max_length for ids, _ in pairs)
        self.lost += not found
        return found

    def _marked(self, row: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each is of an answer that is learned), by the template itself."""
        encoded = self._apply(
            row, len(row.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, judged = np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"]) == 1
        if row.learned != row.answers:
            whole = self.whole(row)
            judged &= self._tokens(whole, self._learned_in(row, whole))[1]
        return ids, judged

    def _learned_in(self, row: Conversation, whole: str) -> list[tuple[int, int]]:
        """Where what is learned lies in the whole text of a row that has other answers too."""
        first = row.learned[0]
        if row.learned == [place for place in row.answers if place >= first]:
            return [(self._behind_heading(row, whole, first), len(whole))]
        spans = [self._span(row, whole, place) for place in row.learned]
        found = [span for span in spans if span]
        if len(found) < len(spans):
            raise UserError(
                f"{row.place}: the tokenizer's chat template rewrites earlier messages, so nobody can say where "
                f"answers of {WEIGHT} 0 end; allowed: no answer of {WEIGHT} 0 behind one that is learned"
            )
        return found

    def whole(self, row: Conversation) -> str:
        """The text of a conversation."""
        return self._write(row, len(row.messages))

    def _texts(self, row: Conversation) -> list[tuple[str, list[tuple[int, int]]]]:
        """The whole text with where its answers are; or a text for each answer."""
        places = row.learned
        whole = self.whole(row)
        spans = [self._span(row, whole, place) for place in places]
        found = [span for span in spans if span]
        if len(found) == len(spans):
            return [(whole, found)]
        texts = [self._write(row, place + 1) for place in places]
        alone = [(text, self._span(row, text, place)) for text, place in zip(texts, places, strict=True)]
        for (_, span), place in zip(alone, places, strict=True):
            if span is None:
                raise UserError(
                    f"{row.place}: message {place + 1}: the tokenizer's chat template writes what comes before an "
                    "answer in another way when the answer is there, so nobody can say where that begins; allowed: a "
                    "template that puts answers between {% generation %} and {% endgeneration %}"
                )
        return [(text, [span]) for text, span in alone if span]

    def _span(self, row: Conversation, text: str, place: int) -> tuple[int, int] | None:
        """Where the answer at `place` lies in the text, what ends its turn included; None if that cannot be told."""
        before = self._write(row, place, prompt=True)
        upto = self._write(row, place + 1)
        if not text.startswith(before) or not text.startswith(upto) or len(upto) <= len(before):
            return None
        begin = len(before)
        if before == self._write(row, place):  # no prompt for an answer: a heading may come before it
            begin = self._behind_heading(row, upto, place)
        return (begin, len(upto.rstrip())) if begin >= len(before) else None

    def _behind_heading(self, row: Conversation, text: str, place: int) -> int:
        """Where a text with the answer at `place` begins to differ from that of any other answer there."""
        others = ({"role": ANSWERS, "content": content} for content in "01")
        rows = [replace(row, messages=(*row.messages[:place], other)) for other in others]
        letters = zip(text, *(self._write(other, place + 1) for other in rows), strict=False)
        return sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, letters))

    def _write(self, row: Conversation, num: int, prompt: bool = False) -> str:
        """The text of the first `num` messages, "" of none; with the prompt for an answer."""
        return str(self._apply(row, num, tokenize=False, add_generation_prompt=prompt)) if num else ""

    def _apply(self, row: Conversation, num: int, **settings: Any) -> Any:
        """What the template makes of the first `num` messages."""
        template = self._template(row)
        with _others_template(row):
            return self._tokenizer.apply_chat_template(
                list(row.messages[:num]), tools=list(row.tools) or None, chat_template=template, **settings
            )

    def _template(self, row: Conversation) -> str:
        """The template that writes a row: a tokenizer may have another one for rows with tools."""
        try:
            return self._tokenizer.get_chat_template(tools=list(row.tools) or None)
        except ValueError as error:
            names = ", ".join(self._tokenizer.chat_template)
            raise UserError(
                f"{row.place}: none of the tokenizer's chat templates is for this row, they are called {names}; "
                "allowed: default, and for a row with tools tool_use; give one of them such a name"
            ) from error

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each begins in a span)."""
        encoded = tokenised(self._tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        judged = np.zeros(len(starts), bool)
        for begin, stop in spans:
            judged |= (starts >= begin) & (starts < stop)
            for token in np.flatnonzero((starts < begin) & (ends > begin)):  # a space may be the first of a word
                judged[token] |= not text[starts[token] : begin].strip(" ")
        return np.array(encoded["input_ids"]), judged

    def _example(self, row: Conversation, ids: np.ndarray, judged: np.ndarray) -> Example | None:
        if not judged[1:].any():
            raise UserError(f"{row.place}: the tokenizer's chat template leaves no token of the answers")
        ids, judged = ids[: self._max_length], judged[: self._max_length]
        if not judged[1:].any():  # the first token is predicted by none
            return None
        labels = np.where(judged, ids, IGNORED)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}


@contextmanager
def _others_template(row: Conversation) -> Iterator[None]:
    """Whatever a template raises is one message that names the row."""
    try:
        yield
    except Exception as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{row.place}: the tokenizer's chat template refuses it: {words}") from error


def chat_table(
    source: str, rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, longest: int
) -> TokenTable:
    """The examples of a split."""
    encoder = ChatEncoder(tokenizer, longest)

    def make() -> dict[str, np.ndarray]:
        examples = list(_examples(encoder, rows))
        columns = {key: [example[key] for example in examples] for key in ("input_ids", "attention_mask", "labels")}
        return flat(columns) | {"cut": np.array([encoder.cut, encoder.lost])}

    settings = ("chats", longest, tokenizer.chat_template, tokenizer.special_tokens_map)
    # with the whole text: a template may write the date
    texts = ((row.messages, row.tools, row.learned, encoder.whole(row)) for row in rows)
    arrays = dict(cached(tokenizer, chain(settings, texts), make))
    cut, lost = arrays.pop("cut").tolist()
    table = TokenTable(arrays)
    if not len(table):
        raise UserError(f"{source}: no answer begins within data.max_length, which is {longest} tokens; raise it")
    if cut:
        told = (
            "%s: %d of %d conversations are longer than data.max_length (%d) and are cut there; %d have no answer then"
        )
        logger.warning(f"{told}, and are left out", source, cut, len(rows), longest, lost)
    return table


def _examples(encoder: ChatEncoder, rows: Sequence[Conversation]) -> Iterator[Example]:
    for row in rows:
        yield from encoder.encode(row)
