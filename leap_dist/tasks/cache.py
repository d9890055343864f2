"""Tokenised data on disk, by what it was made from: the texts, the tokenizer and every setting.

Files are safetensors in $HF_HOME/leap_dist/tokens (~/.cache/huggingface by default), named by the sha256 of what
went in; they may be removed at any time. Where nothing can be written, data is tokenised again for every run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, np.ndarray]

FORMAT = "3"
"""Changes with what the arrays mean."""
SMALLEST = 2**20
"""Characters below which text is tokenised faster than it is worth a file."""

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the files lie."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "leap_dist" / "tokens"


def cached(tokenizer: PreTrainedTokenizerBase, parts: Iterable[object], make: Callable[[], Arrays]) -> Arrays:
    """What `make()` returns, from disk if the same tokenizer made it of the same `parts` before.

    parts: all that the arrays depend on beside the tokenizer, each with a `str` that tells it from others.
    """
    if not tokenizer.is_fast:  # written in Python: nothing says all that decides which tokens come of a text
        return make()
    digest, size = sha256(_tokenizer_state(tokenizer)), 0
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text) + text)
        size += len(text)
    if size < SMALLEST:
        return make()
    file = cache_folder() / f"{digest.hexdigest()}.safetensors"
    arrays = _read(file)
    if arrays is None:
        arrays = make()
        _write(file, arrays)
    return arrays


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """All that decides which tokens come of a text."""
    import tokenizers
    import transformers

    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding"):  # those of its last call
            state.pop(key, None)
    else:  # written in Python: ESM, ByT5, CANINE
        vocabulary = tokenizer.get_vocab() if tokenizer.vocab_files_names else {}  # else its code has all of it
        state = [type(tokenizer).__name__, transformers.__version__, vocabulary, tokenizer.init_kwargs]
    own = (tokenizer.truncation_side, tokenizer.model_input_names, tokenizer.split_special_tokens)
    return json.dumps([FORMAT, tokenizers.__version__, own, state], sort_keys=True, default=str).encode()


def _read(file: Path) -> Arrays | None:
    """The arrays; None if the file is not there, or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): tokenised again", file, error)
        return None


def _write(file: Path, arrays: Arrays) -> None:
    """The file appears under its name only when it is complete."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:  # the second of a full disk
        logger.warning("tokenised data cannot be kept in %s (%s)", file.parent, error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
