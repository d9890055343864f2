"""Training examples from a dataset that is read while the job trains, in an order that a few numbers can resume.

Rows are read in pools of `shuffle_buffer`, and each pool is mixed by itself: where a pool begins in the dataset, and
how much of it is used, says all that comes. Texts are cut into blocks and conversations are not, as elsewhere.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.base import Example
from leap_dist.tasks.chats import ChatEncoder, Conversation
from leap_dist.tasks.documents import Frame, columns_of, document_of, tokens_of_each
from leap_dist.tasks.tables import guarded, hub_stream, split_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 64
"""Rows that are tokenised at once."""

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a row is: the pass over the dataset, the pool (rows before it, and what `datasets` resumes it from), the
    row in the mixed pool."""

    epoch: int = 0
    before: int = 0
    source: dict[str, Any] | None = None
    row: int = 0


class _Rows:
    """The rows of a streamed split, pass by pass."""

    def __init__(self, data: DataConfig) -> None:
        (key, split), _ = split_names(data)
        self.source, self.pool, self.task = f"{data.dataset} {split}", data.shuffle_buffer, data.task
        self._dataset = hub_stream(key, data, split)
        first = next(guarded(key, copy.deepcopy(self._dataset)), None)
        if first is None:
            raise UserError(f"{key}: {self.source}: no rows in it")
        self.first: Row = first
        self.columns = columns_of(data, first)
        self.num = 0  # rows read of this pass

    def read(self, place: Place, seed: int) -> Iterator[tuple[Place, str, Row]]:
        """The rows of a pass from a place on, each with its own place and with what messages call it."""
        dataset = copy.deepcopy(self._dataset)
        if self.pool > 1:  # files, too, come in an order of their own
            dataset.set_epoch(seed * 1_000_003 + place.epoch + 1)
        if place.source is not None:
            dataset.load_state_dict(place.source)
        self.num = place.before
        rows = guarded("data.train", dataset, self.num)
        while pool := list(islice(rows, self.pool)):
            order = np.random.default_rng([seed, place.epoch, place.before]).permutation(len(pool)).tolist()
            for index in range(place.row, len(pool)):
                name = f"{self.source}: row {place.before + order[index] + 1}"
                yield replace(place, row=index), name, pool[order[index]]
            self.num += len(pool)
            place = Place(place.epoch, self.num, dataset.state_dict())


class Stream:
    """Examples of a split in an order that the seed decides; `state` resumes them exactly."""

    def __init__(
        self,
        rows: _Rows,
        kind: type,
        encode: Callable[[list[Any]], Sequence[Any]],
        size: int,
        make: Callable[[list[Any]], Example],
    ) -> None:
        """encode: what each row gives, tokens or whole examples; make: an example of `size` of them."""
        self._read, self._kind = rows, kind
        self._encode, self._size, self._make = encode, size, make
        self.source = rows.source
        self.begin(seed=0)

    def begin(self, seed: int) -> None:
        """Start anew, in the order that the seed decides."""
        self._seed = seed
        self.resume({**asdict(Place()), "offset": 0, "filled": False})

    @property
    def state(self) -> dict[str, Any]:
        """Where the next example begins; JSON-able."""
        place = self._pieces[0][0] if self._pieces else self._next
        return {**asdict(place), "offset": self._offset, "filled": self._filled}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream of the same dataset, seed and settings was."""
        found = dict(state)
        self._offset, self._filled = found.pop("offset"), found.pop("filled")  # whether the rows have filled a step yet
        self._next, self._held = Place(**found), -self._offset  # `held`: tokens, or examples, that are not used
        self._pieces: deque[tuple[Place, Sequence[Any]]] = deque()  # what rows gave that is not used up
        self._rows = self._read.read(self._next, self._seed)

    def take(self, count: int, purpose: str) -> list[Example]:
        """The next examples, for what messages name. Raises UserError where there are not so many in all."""
        found: list[Example] = []
        while len(found) < count:
            while self._held < self._size:
                self._fill(count, purpose)
            found.append(self._make(self._cut()))
        self._filled = True
        return found

    def _cut(self) -> list[Any]:
        """The next `size` tokens, or examples, by the row that they are of."""
        parts, needed = [], self._size
        while needed:
            piece = self._pieces[0][1]
            part = piece[self._offset : self._offset + needed]
            parts.append(part)
            needed -= len(part)
            self._offset += len(part)
            if self._offset >= len(piece):
                self._pieces.popleft()
                self._offset = 0
        self._held -= self._size
        return parts

    def _fill(self, count: int, purpose: str) -> None:
        """Read on, at most to the end of a pass."""
        rows = list(islice(self._rows, ROWS))
        found: list[str | Conversation] = []
        for _, name, row in rows:
            found.append(document_of(row, name, self._read.columns, self._read.task))
            if not isinstance(found[-1], self._kind):
                kinds = ("texts", "a conversation") if self._kind is str else ("conversations", "a text")
                raise UserError(f"{name}: {kinds[1]}, and the rows before are {kinds[0]}; allowed: one of both")
        for (place, _, _), piece in zip(rows, self._encode(found), strict=True):
            self._next = replace(place, row=place.row + 1)
            if len(piece):
                self._pieces.append((place, piece))
                self._held += len(piece)
        if not rows:
            self._end(count, purpose)

    def _end(self, count: int, purpose: str) -> None:
        """Behind the last row: a pass that fills no step is refused, else the next one begins."""
        of = f"data.train: {self.source}: ended behind row {self._read.num:,}"
        if not self._filled:
            what = "conversations" if self._kind is Conversation else f"blocks of {self._size} tokens"
            raise UserError(
                f"{of}, before {purpose} was full, which takes {count} {what}; use fewer or smaller batches, a smaller "
                "data.max_length, or more data"
            )
        logger.warning("%s, in %s: its rows are read again", of, purpose)
        self._next = Place(self._next.epoch + 1)
        self._rows = self._read.read(self._next, self._seed)


def _examples(chats: ChatEncoder, rows: Sequence[Conversation], longest: int) -> Iterator[list[Example]]:
    """What each conversation gives; the first that is too long is reported, as nobody knows how many will be."""
    for row in rows:
        before = chats.cut
        yield chats.encode(row)
        if chats.cut and not before:
            told = "%s: longer than data.max_length (%d) and cut there, as others may be"
            logger.warning(f"{told}; what has no answer then is left out", row.place, longest)


def open_stream(data: DataConfig, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Stream:
    """The stream of the split that data.train names: of blocks of text, or of conversations, as its first row says."""
    rows = _Rows(data)
    kind = type(document_of(rows.first, f"{rows.source}: row 1", rows.columns, data.task))
    if kind is Conversation:
        chats = ChatEncoder(tokenizer, data.max_length)
        return Stream(
            rows, kind, lambda found: [*_examples(chats, found, data.max_length)], 1, lambda parts: parts[0][0]
        )

    def encode(texts: Sequence[Any]) -> list[np.ndarray]:
        """An empty array of a document of white space alone."""
        kept = iter(tokens_of_each([text for text in texts if text.strip()], tokenizer, frame.end))
        return [next(kept) if text.strip() else np.zeros(0, np.int32) for text in texts]

    def block(parts: list[np.ndarray]) -> Example:
        ids = [*frame.before, *np.concatenate(parts).tolist(), *frame.after]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    return Stream(rows, kind, encode, data.max_length - len(frame.before) - len(frame.after), block)
