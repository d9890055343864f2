"""docker/, by what can be seen without an engine: settings, paths and scripts fit the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RECIPE = (DOCKER / "Dockerfile").read_text("utf-8")


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text("utf-8"))
    return found


def test_every_setting_of_compose_stands_in_the_env_file() -> None:
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text("utf-8")))
    lines = (DOCKER / ".env").read_text("utf-8").splitlines()
    assert used == {line.partition("=")[0] for line in lines if line and not line.startswith("#")}


def test_services_are_watched_and_jobs_wait_for_them() -> None:
    services = compose("compose.yaml")["services"]
    assert set(services) == {"mlflow", "ray-head", "ray-worker", "prune", "sweep"}
    for name, service in services.items():
        assert "healthcheck" in service or service["profiles"] == ["jobs"], name
        assert all(services[other].get("healthcheck") for other in service.get("depends_on", ()))
    assert set(compose("compose.gpu.yaml")["services"]) <= set(services)


def test_every_place_where_a_sweep_runs_knows_the_store() -> None:
    services = compose("compose.yaml")["services"]
    for name in ("ray-head", "ray-worker", "sweep"):
        assert services[name]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000", name
    assert set(services["sweep"]["depends_on"]) == {"mlflow", "ray-head"}
    _, job = yaml.safe_load_all((DOCKER / "cluster" / "rayjob.yaml").read_text("utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "MLFLOW_TRACKING_URI", "value": "MLFLOW"} in container["env"]


def test_what_the_image_copies_is_let_through() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", RECIPE, re.MULTILINE)
    paths = {path for line in copied for path in line.split()}
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert paths == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / path).exists() for path in paths)


def test_the_image_takes_the_dependencies_of_the_package(tmp_path: Path) -> None:
    extras = re.search(r"requirements\.py ([a-z ]+) >", RECIPE)
    assert extras is not None
    command = [sys.executable, str(DOCKER / "requirements.py"), *extras[1].split()]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    optional = PROJECT["optional-dependencies"]
    assert printed == PROJECT["dependencies"] + [item for name in extras[1].split() for item in optional[name]]
    torch = next(item for item in printed if item.startswith("torch>"))
    assert RECIPE.count(f'"{torch}"') == 2


def test_the_image_is_not_run_by_root() -> None:
    assert re.findall(r"^USER (.+)$", RECIPE, re.MULTILINE) == ["1000"]
    assert "--uid 1000 leap" in RECIPE
    _, job = yaml.safe_load_all((DOCKER / "cluster" / "rayjob.yaml").read_text("utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == 1000


FAKES = {"scontrol": "printf 'node-a\\nnode-b\\n'", "srun": 'SLURM_NODEID=1 "$@"', "deepspeed": 'printf "%s\\n" "$@"'}


@pytest.mark.parametrize("gpus", [None, "4"])
def test_the_slurm_script_starts_a_launcher_on_each_node(tmp_path: Path, gpus: str | None) -> None:
    """With stand-ins for Slurm's commands and for the launcher, which tells how it was called."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
    with (tmp_path / "deepspeed").open("a", encoding="utf-8") as file:
        file.write('cat "$2"\n')
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[a-b]"}
    environment |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    command = ["bash", str(DOCKER / "cluster" / "slurm.sh"), "job.json", "runs/one"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    words = done.stdout.split()
    assert words[:1] + words[2:-4] == [
        *("--hostfile", "--no_ssh", "--node_rank", "1", "--master_addr", "node-a"),
        *("--no_python", "leap-prune", "--config", "job.json", "--output", "runs/one"),
    ]
    assert words[-4:] == ["node-a", f"slots={gpus or 1}", "node-b", f"slots={gpus or 1}"]
    assert not list(tmp_path.glob("hosts.*"))


def test_scripts_are_shell_that_parses() -> None:
    for script in (DOCKER / "cluster" / "slurm.sh", ROOT / "tests" / "bench" / "two_hosts.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
