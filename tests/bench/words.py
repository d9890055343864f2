"""The loss of words by chunks of tokens, against that of all logits at once: seconds, and memory at its peak.

    python -m tests.bench.words --model FOLDER [--rows 2] [--length 512]

A forward and a backward pass of random tokens in fp32 on the CPU, both ways in turn; the first of each is not counted.
Memory is what torch holds beside model and gradients. RuntimeError if the losses differ by more than 1e-5. Writes
results/words.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from leap_dist.bench.jumps import most_held
from leap_dist.tasks.head import WordHead

ROUNDS = 3


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).train()
    tokens = torch.randint(0, model.config.vocab_size, (given.rows, given.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    words = WordHead(model, causal=True)
    if not words.fits(batch):
        raise RuntimeError("the model's head cannot be called by chunks")
    ways: dict[str, Callable[[], Tensor]] = {
        "all at once": lambda: model(**batch).loss,
        "by chunks": lambda: words.loss(batch)[0],
    }
    losses = {name: _pass(model, way)[0] for name, way in ways.items()}
    if abs(losses["by chunks"] / losses["all at once"] - 1.0) > 1e-5:
        raise RuntimeError(f"the losses differ: {losses}")
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(_pass(model, way)[1])
    held = {name: most_held(lambda way=way: _pass(model, way)) for name, way in ways.items()}
    found = {
        "tokens": tokens.numel(),
        "vocabulary": model.config.vocab_size,
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "peak_mb": {name: round(value / 1e6) for name, value in held.items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "words.json").write_text(json.dumps(found, indent=1) + "\n")


def _pass(model: torch.nn.Module, way: Callable[[], Tensor]) -> tuple[float, float]:
    """The loss of one forward and backward pass, and its seconds; gradients are zeroed in place."""
    model.zero_grad(set_to_none=False)
    began = time.perf_counter()
    loss = way()
    loss.backward()
    return loss.item(), time.perf_counter() - began


if __name__ == "__main__":
    main()
