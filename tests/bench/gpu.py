"""What has to be measured on a GPU, in one go: tests/bench/gpu.sh, or python -m tests.bench.gpu [--out FOLDER] [--tiny]

Kernels against their references, the bandwidth of the fused update against a copy of as many bytes, steps of BERT-base
and of a decoder of 1.2 billion parameters with their peak memory, exact selection, 2:4 inference. Every part runs in a
process of its own, so that one that fails takes no other with it; the exit code is 1 then. Models have random weights:
nothing is downloaded. Writes gpu_<card>.json. --tiny: small sizes on the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.machine import machine, wait_for_device

RESULTS = Path(__file__).parent / "results"
ROUNDS, WARM_UP = 9, 3
BERT: dict[str, Any] = {"model_type": "bert"}  # transformers' defaults are BERT-base
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
SHAPES = {"BERT-base": (BERT, 32, 128), "decoder of 1.2 billion": (LLAMA, 2, 1024)}  # config, batch, tokens
GATES = {"dense": None, "element": ["element"], "block:32x32": ["block:32x32"], "head+neuron": ["head", "neuron"]}
UPDATE_BYTES = 33 + 24  # read and written of an element: fp32 but for the mask; the gradient and the weight are read
TINY_CHECKS = ("check_plain_update", "check_masked_write")  # the tests of the kernels run them all


def median_seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of a call, the device's work included."""
    passed = []
    for done in range(WARM_UP + rounds):
        wait_for_device()
        before = time.perf_counter()
        run()
        wait_for_device()
        if done >= WARM_UP:
            passed.append(time.perf_counter() - before)
    return statistics.median(passed)


# ------------------------------------------------------------------------------------------------ parts


def kernels(tiny: bool) -> dict[str, Any]:
    """Every kernel against float64 or its plain-torch reference; RuntimeError with what differs."""
    from tests.ops.test_kernels import CHECKS, run_checks

    raised = run_checks(TINY_CHECKS if tiny else tuple(CHECKS))
    if failed := {name: text for name, text in raised.items() if text}:
        raise RuntimeError("\n".join(f"{name}: {text}" for name, text in failed.items()))
    return {"checked": sorted(raised)}


def bandwidth(tiny: bool) -> dict[str, Any]:
    """The fused update of an element gate, and a copy of as many bytes, in one run."""
    from leap_dist.ops import kernels
    from leap_dist.ops.dispatch import GPU_ROW
    from leap_dist.ops.reference import Adam, run_table

    num = 5000 if tiny else 1 << 28
    rounds = 1 if tiny else ROUNDS
    adam = Adam(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=3)
    table = run_table([(0, num, 0, 1)], GPU_ROW).to(torch.get_default_device())
    grad, hosted, latent, score = (torch.randn(num) for _ in range(4))
    moments = [torch.rand(num) for _ in range(4)]
    mask = torch.rand(num) < 0.5
    arguments = table, grad, hosted, mask, None, latent, *moments[:2], score, *moments[2:], adam, adam
    update = median_seconds(lambda: kernels.element_adamw_(*arguments), rounds)
    half = torch.empty(num * UPDATE_BYTES // 2, dtype=torch.uint8)
    other = torch.empty_like(half)
    copy = median_seconds(lambda: other.copy_(half), rounds)
    return {"elements": num, "GB/s": num * UPDATE_BYTES / update / 1e9, "update / copy of its bytes": update / copy}


def steps(tiny: bool) -> dict[str, Any]:
    """Steps in bf16 under ZeRO 2, every variant in a process of its own: seconds, ratio to dense, memory."""
    from leap_dist.bench.processes import on_ranks

    found: dict[str, Any] = {}
    for shape in list(SHAPES)[-1:] if tiny else SHAPES:
        rows = {name: on_ranks(1, one_step, shape, name, tiny)[0] for name in (list(GATES)[:2] if tiny else GATES)}
        for row in rows.values():
            row["ratio"] = row["seconds"] / rows["dense"]["seconds"]
        found[shape] = rows
    return found


def one_step(shape: str, name: str, tiny: bool) -> dict[str, Any]:
    """What a rank does: seconds of a step, bytes that the engine holds, their forecast, the peak of a step."""
    import leap_dist
    from leap_dist.bench import overhead
    from leap_dist.bench.budget import Hosting, memory
    from leap_dist.bench.forecast import empty_task
    from leap_dist.config.job_file import parse_leap
    from leap_dist.config.sections import ModelConfig
    from leap_dist.models.load import load_model
    from leap_dist.models.plan import make_plan
    from leap_dist.zero.dense import initialize_dense

    config, batch_size, length = SHAPES[shape]
    batch_size, length = (2, 16) if tiny else (batch_size, length)
    own = {key: value for key, value in SMALL.items() if key in config or key in BERT or "key_value" not in key}
    shaped = ModelConfig(from_config={**config, **own} if tiny else config)
    model: Any = load_model(shaped, empty_task(overhead.TASK)).eval()
    keys = overhead.deepspeed_keys(2, batch_size) | {"bf16": {"enabled": True}}
    batch = overhead.random_batch(model, overhead.Setting(batch=batch_size, length=length))
    gates = GATES[name]
    leap = parse_leap({**overhead.PHASE, "gates": gates or ["element"]})
    held = memory(model, make_plan(model, leap) if gates else None, Hosting.of(keys, 1), leap)
    if gates is None:
        engine = initialize_dense(model, keys, overhead.LR, fused=True)
    else:
        section = {"leap": {**overhead.PHASE, "gates": gates}, "train": {"learning_rate": overhead.LR}}
        engine, *_ = leap_dist.initialize(model=model, config={**keys, **section})
    seconds = median_seconds(lambda: overhead.engine_step(engine, batch), 1 if tiny else ROUNDS)
    row: dict[str, Any] = {"seconds": seconds, "forecast bytes": held.total}
    if torch.cuda.is_available():
        row["bytes held"], row["bytes at the peak"] = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return row


def selection(tiny: bool) -> dict[str, Any]:
    """`launch/bench.py select` on the device: cold, from step to step, after a jump."""
    from leap_dist.bench.select import SIZES, bench_select

    return bench_select((10**4,) if tiny else SIZES)


def two_of_four(tiny: bool) -> dict[str, Any]:
    """Products with 2:4 weights in fp16 against dense ones of the same values, by shape of the weight."""
    if tiny:
        return {"left out": "2:4 products of torch need a CUDA device"}
    found = {}
    for rows, columns in ((4096, 4096), (14336, 4096), (4096, 14336)):
        weight = torch.randn(rows, columns)
        best = weight.abs().unflatten(1, (-1, 4)).topk(2, dim=2).indices
        mask = torch.zeros(rows, columns // 4, 4).scatter_(2, best, 1.0).view_as(weight)
        dense = nn.Parameter((weight * mask).half(), requires_grad=False)
        sparse = nn.Parameter(torch.sparse.to_sparse_semi_structured(dense.detach()), requires_grad=False)
        found[f"{rows}x{columns}"] = _products(dense, sparse, torch.randn(4096, columns).half())
    return found


def _products(dense: Tensor, sparse: Tensor, inputs: Tensor) -> dict[str, float]:
    with torch.inference_mode():
        expected, got = nn.functional.linear(inputs, dense), nn.functional.linear(inputs, sparse)
        error = ((got - expected).float().norm() / expected.float().norm()).item()
        seconds = [median_seconds(lambda w=w: nn.functional.linear(inputs, w)) for w in (dense, sparse)]
    return {"dense / 2:4": seconds[0] / seconds[1], "relative error": error}


PARTS = {part.__name__: part for part in (kernels, bandwidth, steps, selection, two_of_four)}

# ------------------------------------------------------------------------------------------------ the run


def in_process(name: str, tiny: bool, answers: Any) -> None:
    """A part's life."""
    torch.set_default_device("cpu" if tiny or name == "steps" else "cuda")  # the steps place their models themselves
    torch.manual_seed(0)
    try:
        answers.put(PARTS[name](tiny))
    except Exception:
        answers.put({"failed": traceback.format_exc()})


def run_part(name: str, tiny: bool) -> dict[str, Any]:
    """A part in a fresh process, with its seconds."""
    context = multiprocessing.get_context("spawn")
    answers, before = context.SimpleQueue(), time.perf_counter()
    process = context.Process(target=in_process, args=(name, tiny, answers))
    process.start()
    process.join()
    ended = {"failed": f"the process ended with code {process.exitcode} and no answer"}
    found: dict[str, Any] = ended if answers.empty() else answers.get()
    return found | {"part's seconds": round(time.perf_counter() - before, 1)}


def main() -> int:
    """Run all parts, print and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny runs without one")
    if arguments.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    card = "tiny" if arguments.tiny else torch.cuda.get_device_name(0)
    found: dict[str, Any] = {"card": card, "cuda": torch.version.cuda, "machine": machine()}
    for name in PARTS:
        found[name] = run_part(name, arguments.tiny)
        print(f"{name}: {json.dumps(found[name], indent=1)}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower())}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    failed = [name for name in PARTS if "failed" in found[name]]
    print(f"written: {file}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
