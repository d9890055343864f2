"""Imports run one way, heavy libraries stay in their place, and importing the package starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # from the ground up; a module imports from its own layer and from those below it
    *("secrets", "errors", "files", "machine", "console", "stopping"),
    *("ops", "config", "core", "run_parts", "run_folder"),
    *("tasks", "models", "zero", "export", "checkpoint", "tracking", "train", "bench"),
    *("sweep", "cli", "launch"),
]
LAYER_OF = {package: layer for layer, package in enumerate(LAYERS)}
ONLY_IN = {"deepspeed": {"zero", "checkpoint"}, "mlflow": {"tracking"}, "ray": {"sweep"}}
NOT_IN_CORE_OR_OPS = {"deepspeed", "transformers", "datasets"}
HEAVY = ["deepspeed", "transformers", "mlflow", "datasets", "ray"]

MODULES = sorted((ROOT / "leap_dist").rglob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))


def module_name(file: Path) -> str:
    """The dotted name: leap_dist.core.gates, leap_dist.core for its __init__."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file; `from a import b` gives both a and a.b."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def package_of(name: str) -> str:
    """Which part of leap_dist a module belongs to: "core" for leap_dist.core.gates."""
    return [*name.split("."), ""][1]


def wrong_imports(file: Path) -> list[str]:
    """What breaks a rule in one file, one line each."""
    own = package_of(module_name(file)) if file.is_relative_to(ROOT / "leap_dist") else "launch"
    wrong = []
    for line, name in imported(file):
        top, package = name.split(".")[0], package_of(name)
        upwards = package in LAYER_OF and own in LAYER_OF and LAYER_OF[package] > LAYER_OF[own]
        foreign = own not in ONLY_IN.get(top, {own}) or (own in ("core", "ops") and top in NOT_IN_CORE_OR_OPS)
        if (top == "leap_dist" and upwards) or (top != "leap_dist" and foreign):
            wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_every_module_has_a_layer() -> None:
    packages = {package_of(module_name(file)) for file in MODULES} - {""}
    assert packages <= LAYER_OF.keys()


@pytest.mark.parametrize("file", MODULES + SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    assert not wrong_imports(file)


def test_no_circle_of_modules() -> None:
    names = {module_name(file) for file in MODULES}
    graph = {
        module_name(file): {name for _, name in imported(file) if name in names and name != module_name(file)}
        for file in MODULES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import leap_dist, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LEAN = """
import leap_dist.zero, deepspeed, sys, torch
hidden = "mlflow" not in sys.modules
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon import original_muon
hidden &= "torch._inductor.compile_fx" not in sys.modules
with torch.compiler.set_stance("force_eager"):
    done = original_muon.zeropower_via_newtonschulz5(torch.eye(4), steps=5)
import mlflow
print(hidden, bool(torch.linalg.svdvals(done.float()).sub(1).abs().max() < 0.5), mlflow.__name__, file=sys.stderr)
"""


def test_deepspeed_imports_no_mlflow_and_compiles_no_optimizer_that_is_not_used() -> None:
    """6 s and 186 MB less in every rank; whoever wants MLflow or Muon later has it."""
    found = subprocess.run([sys.executable, "-c", LEAN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "True True mlflow", found.stderr
