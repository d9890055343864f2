"""The console scripts: the launchers by other names, in a checkout and from a wheel; help, start-up and completion."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from leap_dist import cli
from leap_dist.files import shipped
from tests.test_imports import HEAVY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted(file.stem for file in (ROOT / "launch").glob("*.py"))


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Some Python in a process of its own, in an empty folder."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_every_launcher_is_a_console_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {f"leap-{name}": f"leap_dist.cli:{name}" for name in LAUNCHERS} | project["scripts"]
    assert len(project["scripts"]) == len(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_tells_what_a_command_does_and_its_exit_codes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"leap-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(cli, name)()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: leap-{name} ") and "Exit codes: 0 " in shown
    assert all(len(line) <= 120 for line in shown.splitlines())


HELP = """
import contextlib, io, sys
from leap_dist import cli
for name in sys.argv[1:]:
    sys.argv = [f"leap-{name}", "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        getattr(cli, name)()
print([name for name in (*HEAVY, "torch", "numpy", "pydantic", "rich") if name in sys.modules])
"""


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"HEAVY = {HEAVY}\n{HELP}".replace("sys.argv[1:]", repr(LAUNCHERS))
    done = run(code, tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("line", "offered"), [("leap-prune --re", {"--resume"}), ("leap-bench s", {"select", "scale"})]
)
def test_a_shell_completes_options_and_subcommands(tmp_path: Path, line: str, offered: set[str]) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    name = line.split()[0]
    code = f"import sys; sys.argv = ['{name}']; from leap_dist import cli; cli.{name.removeprefix('leap-')}()"
    done = run(code, tmp_path, _ARGCOMPLETE_STDOUT_FILENAME=str(answer), **asked)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert {word.strip() for word in answer.read_text("utf-8").splitlines()} == offered


def test_launchers_and_configs_are_found_beside_the_package() -> None:
    assert shipped("launch") == ROOT / "launch" and shipped("configs") == ROOT / "configs"


USE = """
import sys
from leap_dist import cli
sys.argv = ["leap-prune", "--config", "ds_leap.json", "--set", "leap.target=7"]
sys.exit(cli.prune())
"""


def test_a_wheel_brings_launchers_and_configs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    brought = {path.relative_to(ROOT) for name in ("launch", "configs") for path in (ROOT / name).rglob("*.*")}
    brought = {path for path in brought if path.suffix in (".py", ".json")}
    assert all((installed / "leap_dist" / path).is_file() for path in brought)
    assert {path.name for path in installed.iterdir()} == {"leap_dist", "leap_dist-0.1.0.dist-info"}
    done = run(USE, elsewhere, PYTHONPATH=str(installed))
    assert done.returncode == 2
    expected = f"error: {installed}/leap_dist/configs/ds_leap.json: 1 problem\n  leap.target: got 7; allowed: "
    assert done.stderr.startswith(expected), done.stderr
