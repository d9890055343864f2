"""The Triton kernels in Triton's interpreter on the CPU, against float64: no GPU is needed, and none has run them.

The interpreter is chosen by an environment variable when triton is imported, so that the checks run in a process of
their own; in this file `check_*` are run there, and every one is a test here. tests/bench/gpu.py runs them on a GPU.
"""

import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.ops import reference, soft, units
from leap_dist.ops.reference import Adam
from tests.ops import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def check_plain_update() -> None:
    from leap_dist.ops import kernels

    for size in (0, 1, 1023, 1025):
        weight, grad, exp_avg, exp_avg_sq = torch.randn(size), torch.randn(size), torch.randn(size), torch.rand(size)
        exact = [tensor.double() for tensor in (weight, grad, exp_avg, exp_avg_sq)]
        reference.adamw_(*exact, runs.ADAM)
        kernels.adamw_(weight, grad, exp_avg, exp_avg_sq, runs.ADAM)
        for got, expected in zip((weight, exp_avg, exp_avg_sq), (exact[0], *exact[2:]), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def check_element_update() -> None:
    from leap_dist.ops import kernels

    for moments, hybrid in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        arguments = runs.state(1, moments)
        arguments["others"] = arguments["others"] if hybrid else None
        exact, sigma = runs.expected(arguments)
        table = runs.table()
        partial = kernels.element_adamw_(table, *arguments.values(), runs.ADAM, runs.SCORE_ADAM)
        for key, value in exact.items():
            rtol, atol = (1e-2, 1e-4) if arguments[key].dtype == torch.bfloat16 else (1e-5, 1e-6)
            torch.testing.assert_close(arguments[key].double(), value, rtol=rtol, atol=atol)
        by_gate = torch.zeros_like(sigma).index_add_(0, table[:, reference.GATE], partial)
        torch.testing.assert_close(by_gate, sigma, rtol=1e-5, atol=1e-4)


def check_shared_update() -> None:
    from leap_dist.ops import kernels

    for moments, hybrid in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        arguments = runs.state(1, moments)
        arguments["others"] = arguments["others"] if hybrid else None
        exact, sigma = runs.expected_of_shared(arguments)
        table = runs.table()
        partial = kernels.shared_adamw_(table, *runs.shared(arguments).values(), runs.ADAM, runs.SCORE_ADAM.lr)
        for key, value in exact.items():
            rtol, atol = (1e-2, 1e-4) if arguments[key].dtype == torch.bfloat16 else (1e-5, 1e-6)
            torch.testing.assert_close(arguments[key].double(), value, rtol=rtol, atol=atol)
        by_gate = torch.zeros_like(sigma).index_add_(0, table[:, reference.GATE], partial)
        torch.testing.assert_close(by_gate, sigma, rtol=1e-5, atol=1e-4)


def check_any_cut_gives_the_same_bits() -> None:
    from leap_dist.ops import kernels

    whole, cut = runs.state(0), runs.state(0)
    kernels.element_adamw_(runs.table(4096), *whole.values(), runs.ADAM, runs.SCORE_ADAM)
    kernels.element_adamw_(runs.table(333), *cut.values(), runs.ADAM, runs.SCORE_ADAM)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def check_the_masked_update_is_that_of_the_element_update() -> None:
    from leap_dist.ops import kernels

    whole, other = runs.state(0), runs.state(0)
    kernels.element_adamw_(runs.table(), *whole.values(), runs.ADAM, runs.SCORE_ADAM)
    latent = other["latent"], other["exp_avg"], other["exp_avg_sq"]
    kernels.masked_adamw_(runs.table(), other["grad"], other["mask"], *latent, runs.ADAM)
    assert all(torch.equal(whole[key], other[key]) for key in ("latent", "exp_avg", "exp_avg_sq"))


def check_the_update_of_scores_alone_is_that_of_the_element_update() -> None:
    from leap_dist.ops import kernels

    for hybrid in (False, True):
        whole, alone = runs.state(0), runs.state(0)
        whole["others"] = alone["others"] = whole["others"] if hybrid else None
        sigma = kernels.element_adamw_(runs.table(), *whole.values(), runs.ADAM, runs.SCORE_ADAM)
        left_out = ("mask", "exp_avg", "exp_avg_sq")
        rest = [value for key, value in alone.items() if key not in left_out]
        assert torch.equal(kernels.score_adamw_(runs.table(), *rest, runs.SCORE_ADAM), sigma)
        for key in ("score", "score_exp_avg", "score_exp_avg_sq"):
            assert torch.equal(whole[key], alone[key])


def check_without_pruning_it_is_the_plain_update() -> None:
    from leap_dist.ops import kernels

    table = reference.run_table([(0, runs.NUMEL, 0, 1)], 700)
    ones = torch.ones(runs.NUMEL, dtype=torch.bool)
    masked, plain = runs.state(0), runs.state(0)
    for step in range(1, 4):
        adam = Adam(*runs.ADAM)._replace(step=step)
        kernels.masked_adamw_(table, masked["grad"], ones, *_latent(masked), adam)
        weight, *moments = _latent(plain)
        kernels.adamw_(weight, plain["grad"], *moments, adam)
    assert all(torch.equal(a, b) for a, b in zip(_latent(masked), _latent(plain), strict=True))


def _latent(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return state["latent"], state["exp_avg"], state["exp_avg_sq"]


def check_masked_write() -> None:
    from leap_dist.ops import kernels

    for dtype in (torch.float32, torch.bfloat16):
        latent, mask = torch.randn(runs.NUMEL), torch.rand(runs.NUMEL) < 0.5
        hosted = torch.full((runs.NUMEL,), float("nan"), dtype=dtype)
        kernels.write_masked_(runs.table(), latent, mask, hosted)
        inside = runs.covered()
        got, expected = hosted[inside].float(), (latent * mask)[inside]
        # the interpreter cuts fp32 to bf16 where a GPU rounds: up to 2^-7 of the value instead of 2^-8
        rtol = 2.0**-7 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0.0)
        assert hosted[~inside].isnan().all()


def check_count_and_take() -> None:
    from leap_dist.ops import kernels

    scores = torch.randn(runs.NUMEL)
    scores[[7, 1600, 2000]] = torch.tensor([float("nan"), float("inf"), 0.25])
    for width in (0.0, 0.1, float("inf")):
        bracket = torch.tensor([[0.25 - width] * runs.NUM_GATES, [0.25 + width] * runs.NUM_GATES])
        counts = kernels.count_inside(runs.table(), scores, bracket)
        assert torch.equal(counts, reference.count_inside(runs.table(), scores, bracket))
        for wanted in (counts[:, 1], torch.where(torch.arange(len(counts)) % 2 == 0, counts[:, 1], 0)):
            taken = kernels.take_inside(runs.table(), scores, bracket, wanted)
            assert torch.equal(taken, reference.take_inside(runs.table(), scores, bracket, wanted))
    none = torch.empty(0, 4, dtype=torch.int64)
    assert kernels.count_inside(none, scores, bracket).shape == (0, 2)
    assert kernels.take_inside(none, scores, bracket, none[:, 0]).shape == (0,)


def check_histogram() -> None:
    from leap_dist.ops import kernels

    low, high = reference.to_keys(torch.tensor([-0.5, 0.5])).tolist()
    base, room = torch.tensor([0, low, low]), torch.tensor([3, 35 - (high - low).bit_length(), 0])
    for num in (0, 1, 3000):
        scores = (torch.rand(num) - 0.5) * torch.randint(2, (num,))  # half of them 0.0 or -0.0
        table = reference.run_table(
            [(0, num // 3, 0, 0), (num // 3, num // 3, 2, 1), (num // 3 * 2, min(num, 1), 1, 2)], 700
        )
        covered = scores[: int(table[:, reference.LENGTH].sum())]
        for shift in (28, 21, 0):
            keys = (reference.to_keys(covered[-1:]) - base[1:2]) << room[1:2]
            prefix = torch.cat([keys, keys, keys])[:3] >> (shift + 7) if num else torch.zeros(3, dtype=torch.int64)
            arguments = table, covered, base, room, prefix, shift
            assert torch.equal(kernels.histogram(*arguments), reference.histogram(*arguments))


def check_cut() -> None:
    from leap_dist.ops import kernels

    scores = (torch.randn(runs.NUMEL) * 2).round()
    cuts = torch.tensor([0.0, 1.0, -1.0, 0.0])[: runs.NUM_GATES]
    lengths = runs.table()[:, reference.LENGTH]
    for shares in (lengths * 0, lengths // 5, lengths * 0 + 1, lengths, lengths * 0 - 3, lengths * 0 + (1 << 62)):
        mask, expected = torch.ones(runs.NUMEL, dtype=torch.bool), torch.ones(runs.NUMEL, dtype=torch.bool)
        kernels.cut_(runs.table(), scores, cuts, shares, mask)
        reference.cut_(runs.table(), scores, cuts, shares, expected)
        assert torch.equal(mask, expected)


def check_unit_sums() -> None:
    from leap_dist.ops import unit_kernels

    grad, latent, others = torch.randn(2000), torch.randn(2000), torch.rand(2000) < 0.5
    for kind in runs.SLICES:
        of_element = runs.unit_of(kind)
        inside = of_element >= 0
        for mask in (None, others):
            values = grad.double() * latent.double() * (1.0 if mask is None else mask)
            expected = torch.zeros(runs.num_units(kind), dtype=torch.float64)
            expected.index_add_(0, of_element[inside], values[inside])
            sums = unit_kernels.unit_sums(runs.patches(kind), grad, latent, mask, len(expected))
            torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5, msg=kind)
    together = torch.cat([runs.patches(kind) for kind in runs.SLICES])
    num = max(runs.num_units(kind) for kind in runs.SLICES)
    expected = units.unit_sums(together, grad, latent, None, num)
    torch.testing.assert_close(
        unit_kernels.unit_sums(together, grad, latent, None, num), expected, rtol=1e-5, atol=1e-5
    )


def check_expand_units() -> None:
    from leap_dist.ops import unit_kernels

    for kind in runs.SLICES:
        flags, of_element = torch.rand(runs.num_units(kind)) < 0.5, runs.unit_of(kind)
        patches = runs.patches(kind)
        for before in (False, True):
            mask = torch.full((2000,), before)
            unit_kernels.expand_units_(patches, flags, torch.full_like(flags, before), mask)
            expected = torch.where(of_element >= 0, flags[of_element.clamp(min=0)], torch.tensor(before))
            assert torch.equal(mask, expected)
        mask = torch.rand(2000) < 0.5
        expected = mask & torch.where(of_element >= 0, flags[of_element.clamp(min=0)], torch.tensor(True))
        unit_kernels.expand_units_(patches, flags, None, mask)
        assert torch.equal(mask, expected)


def check_best_of() -> None:
    from leap_dist.ops import kernels

    table, scores, kept = runs.groups()
    for nan in (False, True):
        scores[1304] = float("nan") if nan else 0.0
        mask, expected = torch.ones(runs.NUMEL, dtype=torch.bool), torch.ones(runs.NUMEL, dtype=torch.bool)
        broken = kernels.best_of_(table, scores, kept, mask)
        assert torch.equal(broken, reference.best_of_(table, scores, kept, expected))
        assert broken.sum() == nan and torch.equal(mask[1400:], expected[1400:])
        assert nan or torch.equal(mask, expected)
    assert kernels.best_of_(table[:0], scores, kept, mask).shape == (0,)


def check_soft_masks_and_their_learning() -> None:
    from leap_dist.ops import soft_kernels

    curve, adam = soft.Curve(25.0, 0.7, 0.3, soft.noise_key(5, 3), 0.0), Adam(*runs.SCORE_ADAM)
    keys = soft.noise_keys(curve.key, runs.NUM_GATES, torch.device("cpu"))
    tables = [soft.numbered_table(runs.NUMBERED, size) for size in (700, 333)]
    for pull in (False, True):
        state, hosted = runs.state(0), torch.full((runs.NUMEL,), float("nan"))
        pulls = pull * torch.randn(runs.NUM_GATES, 2)
        mask, exact = runs.expected_of_soft(state, curve, pulls, adam)
        known = keys, state["latent"], state["score"]
        sums = [soft_kernels.write_soft_(table, *known, hosted, curve.scalars()) for table in tables]
        expected = soft.write_soft_(tables[0], *known, hosted.clone(), curve.scalars())
        torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums[0].sum(0), sums[1].sum(0), rtol=1e-6, atol=1e-4)
        inside = ~mask.isnan()
        torch.testing.assert_close(hosted[inside].double(), (state["latent"] * mask)[inside], rtol=1e-4, atol=1e-6)
        assert hosted[~inside].isnan().all()
        own = state["score"], state["score_exp_avg"], state["score_exp_avg_sq"]
        before, states = [tensor.clone() for tensor in own], [state["grad"], state["latent"]]
        for masked in (None, torch.zeros(runs.NUMEL)):
            for tensor, old in zip(own, before, strict=True):
                tensor.copy_(old)
            soft_kernels.learn_soft_(tables[1], keys, *states, *own, masked, curve.scalars(), pulls, adam)
            for tensor, value in zip(own, exact, strict=True):
                torch.testing.assert_close(tensor.double(), value, rtol=1e-4, atol=1e-5)
        expected = torch.where(inside, state["grad"] * mask, 0.0)
        torch.testing.assert_close(masked.double(), expected, rtol=1e-4, atol=1e-6)


CHECKS: dict[str, Callable[[], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("check_") and inspect.isfunction(value)
}


def run_checks(names: Iterable[str] = CHECKS) -> dict[str, str]:
    """What each check raised, by name; empty where it passed."""
    raised = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()
    return raised


@pytest.fixture(scope="module")
def raised() -> dict[str, str]:
    """All checks in one process."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import json; from tests.ops.test_kernels import run_checks; print(json.dumps(run_checks()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str, raised: dict[str, str]) -> None:
    assert raised[name] == "", raised[name]


def test_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code for compute capability 9.0; no GPU is needed for that."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from leap_dist.ops import kernels, soft_kernels, unit_kernels

    fp32, bf16, byte, int64, fp64 = "*fp32", "*bf16", "*u8", "*i64", "*fp64"
    update = [int64, fp32, fp32, byte, byte, fp32, bf16, bf16, fp32, bf16, bf16, fp64] + 13 * ["fp32"]
    block, tile = {"BLOCK": kernels.BLOCK}, {"STEPS": 5, "OTHERS": True, "ROWS": 8, "COLS": 64}
    flag, curve = {"OTHERS": True}, 3 * ["fp32"]
    sources: list[tuple[Any, list[str], dict[str, Any]]] = [
        (kernels._plain_kernel, 4 * [fp32] + ["i64"] + 7 * ["fp32"], block),
        (kernels._update_kernel, update, block | {"WEIGHTS": True, "SCORES": True, "OTHERS": True}),
        (kernels._update_kernel, update, block | {"WEIGHTS": True, "SCORES": False, "OTHERS": False}),
        (kernels._update_kernel, update, block | {"WEIGHTS": False, "SCORES": True, "OTHERS": True}),
        (kernels._shared_kernel, [int64, fp32, fp32, byte, byte, *4 * [fp32], fp64] + 8 * ["fp32"], block | flag),
        (kernels._write_kernel, [int64, fp32, byte, bf16], block),
        (kernels._count_kernel, [int64, fp32, fp32, int64, "i32"], block),
        (kernels._take_kernel, [int64, fp32, fp32, int64, fp32, "i32"], block),
        (kernels._histogram_kernel, [int64, fp32, *4 * [int64], "i32"], block | {"DIGIT_BITS": 7, "WHOLE": True}),
        (kernels._histogram_kernel, [int64, fp32, *4 * [int64], "i32"], block | {"DIGIT_BITS": 7, "WHOLE": False}),
        (kernels._cut_kernel, [int64, fp32, fp32, int64, byte], block),
        (kernels._best_of_kernel, [int64, fp32, int64, byte, byte], block),
        (unit_kernels._sum_kernel, [int64, int64, int64, fp32, fp32, byte, fp64], tile),
        (unit_kernels._fold_kernel, [int64, int64, fp64, fp64, "i32", "i32"], {"FOLD": unit_kernels.FOLD}),
        (unit_kernels._expand_kernel, [int64, int64, byte, byte, byte], block | {"STEPS": 5, "PRODUCT": True}),
        (unit_kernels._expand_kernel, [int64, int64, byte, byte, byte], block | {"STEPS": 5, "PRODUCT": False}),
        (soft_kernels._write_kernel, [int64, int64, fp32, fp32, bf16, fp64, *curve], block | {"SUMS": 4}),
        (soft_kernels._learn_kernel, [int64, int64, *7 * [fp32], *curve, *6 * ["fp32"]], block | {"MASKED": True}),
        (soft_kernels._learn_kernel, [int64, int64, *7 * [fp32], *curve, *6 * ["fp32"]], block | {"MASKED": False}),
    ]
    for kernel, types, constants in sources:
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=kernels.EXACT)
        assert compiled.asm["cubin"]


def test_importing_the_package_and_its_ops_does_not_import_triton() -> None:
    code = "import leap_dist, leap_dist.core.optimizer, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
