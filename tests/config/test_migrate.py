"""Old configs with compression_training: what becomes of them, and what they hear is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import load_job, parse_job, parse_leap
from leap_dist.config.legacy import tensor_pattern
from leap_dist.config.migrate import Imported, import_compression, import_file
from leap_dist.errors import UserError
from tests.disks import fill, free
from tests.launch.test_prune import JOB, MODEL, check_refused, prune

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}


def old(**sections: Any) -> dict[str, Any]:
    return BASE | {"compression_training": sections}


def section(groups: dict[str, Any] | None = None, **shared: Any) -> dict[str, Any]:
    """An enabled section; `groups`: name -> (dense_ratio, modules) or the whole group."""
    made = {
        name: group if isinstance(group, dict) else {"params": {"dense_ratio": group[0]}, "modules": group[1]}
        for name, group in (groups or {}).items()
    }
    return {"shared_parameters": {"enabled": True, **shared}, "different_groups": made}


def sparse(ratio: Any = 0.5, *modules: str, **shared: Any) -> dict[str, Any]:
    return section({"sp1": (ratio, list(modules) or ["*"])}, **shared)


def rows(ratio: float, related: bool) -> dict[str, Any]:
    group: dict[str, Any] = {"params": {"dense_ratio": ratio}, "modules": ["intermediate.dense"]}
    return section(
        {"rp1": group | ({"related_modules": [["layer.\\w+.output.dense"]]} if related else {})}, method="topk"
    )


def heads(ratio: float) -> dict[str, Any]:
    related = [["self.query", "self.key", "self.value"]]
    group = {"params": {"dense_ratio": ratio}, "modules": ["attention.output.dense"], "related_modules": related}
    return section({"hp1": group}, method="topk", num_heads=2)


def snip(**shared: Any) -> dict[str, Any]:
    return section(method="snip_momentum", **shared)


def imported(*, keep: dict[str, Any] | None = None, **sections: Any) -> Imported:
    """Import, and check that the leap section is one."""
    result = import_compression(old(**sections) | (keep or {}))
    parse_leap(result.job["leap"])
    assert "compression_training" not in result.job and result.job["zero_optimization"] == {"stage": 1}
    return result


def told(result: Imported, text: str) -> bool:
    return any(text in note for note in result.notes)


def trainable(job: dict[str, Any]) -> dict[str, Any]:
    """The imported job with the tiny model and task of test_prune."""
    job = job | {key: JOB[key] for key in ("model", "data", "tracking")}
    return job | {"train": JOB["train"] | job.get("train", {})}


# ------------------------------------------------------------------------------ what is carried over


def test_sparse_pruning_by_magnitude() -> None:
    result = imported(sparse_pruning=sparse(0.5, "attention.self", schedule_offset=30, method="l1"))
    pattern = r"re:.*(?:attention.self).*\.weight$"
    assert result.job["leap"] == {"target": 0.5, "gates": [{"granularity": "element", "include": [pattern]}]}
    assert told(result, 'method "l1": LEAP learns scores and thresholds instead; "rule": "magnitude" in leap')
    assert told(
        result, "schedule_offset 30: LEAP counts in parts of the run: set leap.dense_fraction to 30 / train.max"
    )
    assert told(result, "embeddings and the model's head stay dense")
    assert result.missing == ("model.name", "data.task", "train.epochs")


@pytest.mark.parametrize("modules", ["*", ["*"], ["*", "attention"], None])
def test_a_star_or_no_modules_are_all_of_them(modules: Any) -> None:
    group = {"params": {"dense_ratio": 0.2}} | ({} if modules is None else {"modules": modules})
    result = imported(sparse_pruning=section({"sp1": group}, method="topk"))
    assert result.job["leap"] == {"target": 0.2, "gates": ["element"]}
    assert not told(result, "method")


@pytest.mark.parametrize(
    ("pattern", "gate", "target"),
    [
        ("4x1", "block:4x1", 0.4),
        ("32x32", "block:32x32", 0.4),
        ("1x1", "element", 0.4),
        ("2:4", "2:4", 0.5),
        ("2in4", "2:4", 0.5),
        ("1:4", "3:4", 0.75),
    ],
)
def test_snip_momentum_has_blocks_or_n_of_m(pattern: str, gate: str, target: float) -> None:
    """An old 1:4 prunes one of four; ours would keep one."""
    shared = {"schedule_offset": 30, "schedule_offset_end": 90, "schedule_offset_stride": 15, "dense_ratio": 0.4}
    result = imported(sparse_pruning=snip(block_pattern=pattern, excluded_modules=["classifier", "pooler"], **shared))
    excluded = [r"re:.*(?:classifier).*\.weight$", r"re:.*(?:pooler).*\.weight$"]
    assert result.job["leap"] == {"target": target, "gates": [gate], "exclude": excluded}
    assert told(result, "schedule_offset_end 90: LEAP counts in parts of the run: set leap.settle_fraction to 1 - 90 /")
    assert told(result, "schedule_offset_stride: not carried over")
    assert told(result, "excluded_modules: now leap.exclude, for all gates")
    assert told(result, "dense_ratio 0.4: not carried over: the pattern keeps") == (":" in gate and "block" not in gate)


def test_snip_momentum_has_the_documented_defaults_and_no_groups() -> None:
    result = imported(sparse_pruning=section({"sp1": (0.5, ["x"])}, method="snip_momentum"))
    assert result.job["leap"] == {"target": 0.1, "gates": ["block:4x1"]}
    assert told(result, "dense_ratio: missing; 0.1 is DeepSpeed's default")
    assert told(result, 'different_groups: not carried over: method "snip_momentum" has one group')


def test_rows_and_heads_become_neurons_and_heads() -> None:
    result = imported(row_pruning=rows(0.5, related=True), head_pruning=heads(0.7))
    assert result.job["leap"] == {
        "target": 0.6,
        "gates": ["neuron", "head"],
        "include": [r"re:.*(?:intermediate.dense).*\.weight$", r"re:.*(?:attention.output.dense).*\.weight$"],
    }
    assert told(result, 'the gate "neuron" takes the column of the next layer')
    assert told(result, "num_heads: not needed")
    assert told(result, "leap.target 0.6: from row_pruning 0.5 (FFN) and head_pruning 0.7 (attention)")


def test_rows_without_related_modules_stay_rows() -> None:
    result = imported(row_pruning=rows(0.5, related=False))
    include = [r"re:.*(?:intermediate.dense).*\.weight$"]
    assert result.job["leap"]["gates"] == [{"granularity": "row", "include": include}]


def test_densities_of_groups_are_averaged_and_those_of_sections_multiplied() -> None:
    groups = {"sp1": (0.3, ["attention.self"]), "sp2": (0.5, ["intermediate", "attention.output"])}
    result = imported(sparse_pruning=section(groups, method="topk"))
    assert result.job["leap"]["target"] == 0.4
    assert len(result.job["leap"]["gates"][0]["include"]) == 3
    assert told(result, "sparse_pruning: the groups' dense_ratio 0.3, 0.5 become one, their mean 0.4")
    result = imported(sparse_pruning=sparse(0.5), head_pruning=heads(0.5))
    assert result.job["leap"]["target"] == 0.375  # 0.25 of attention, 0.5 of the FFN
    assert told(result, 'modules of the gate "head": not carried over beside gates for other tensors')
    result = imported(sparse_pruning=sparse(0.5, "query"), head_pruning=heads(0.5))
    assert result.job["leap"]["target"] == 0.25


def test_everything_at_once_and_what_is_lost() -> None:
    result = imported(
        keep={
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.98], "weight_decay": 0.0}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 4000}},
            "elasticity": {"enabled": False},
            "tracking": {"mlflow_uri": None},
        },
        layer_reduction={"enabled": True, "keep_number_layer": 6},
        weight_quantization=section({"wq1": {}}),
        activation_quantization={"shared_parameters": {"enabled": False}},
        sparse_pruning=snip(dense_ratio=0.5, schedule_offset=400, schedule_offset_end=3000, patern="4x1"),
        row_pruning=rows(0.5, related=True)
        | {"shared_parameters": {"enabled": True, "schedule_offset": 800, "block_pattern": "4x1"}},
        head_pruning={"shared_parameters": {"enabled": False}},
        channel_pruning=section({"cp1": {}}),
        prune_rows={},
    )
    assert result.job["leap"] == {
        "target": 0.375,
        "gates": ["block:4x1", "neuron"],
        "dense_fraction": 0.1,
        "settle_fraction": 0.25,
    }
    assert result.job["train"] == {"learning_rate": 2e-5, "weight_decay": 0.0, "max_steps": 4000}
    assert "scheduler" in result.job and "optimizer" not in result.job and "elasticity" not in result.job
    assert result.missing == ("model.name", "data.task")
    for lost in ("layer_reduction", "weight_quantization", "channel_pruning", "prune_rows", "elasticity"):
        assert told(result, f"{lost}: not carried over"), lost
    assert told(result, "sparse_pruning.shared_parameters.patern: not carried over: unknown key")
    assert told(result, "row_pruning.shared_parameters.block_pattern: not carried over: unknown key")
    assert told(result, "optimizer.params: not carried over: betas [0.9, 0.98]")
    assert told(result, "LEAP has one dense phase, which ends with the first of them")
    assert not told(result, "activation_quantization") and not told(result, "head_pruning")


def test_steps_that_do_not_fit_the_run_are_told_of() -> None:
    scheduler = {"scheduler": {"params": {"total_num_steps": 1000}}}
    result = imported(keep=scheduler, sparse_pruning=sparse(schedule_offset=900))
    assert "dense_fraction" not in result.job["leap"]
    assert told(result, "set leap.dense_fraction to 900 / train.max_steps")


@pytest.mark.parametrize(
    ("optimizer", "train", "note"),
    [
        ({"type": "Lamb", "params": {"lr": 1e-2}}, None, 'optimizer "Lamb": not carried over: LEAP\'s step is AdamW'),
        ({"type": "Adam", "params": {"lr": "auto"}}, None, 'optimizer.params: not carried over: lr "auto"'),
        ({"type": "Adam", "params": {"lr": 1e-4}}, {"learning_rate": 1e-4}, "optimizer.params.lr 0.0001: now train.l"),
        ("AdamW", None, "optimizer null: not carried over"),
    ],
)
def test_an_optimizer_is_left_out(optimizer: Any, train: Any, note: str) -> None:
    result = imported(keep={"optimizer": optimizer}, sparse_pruning=sparse())
    assert result.job.get("train") == train
    assert told(result, note)


def test_sections_of_a_job_stay() -> None:
    train = {"epochs": 2, "learning_rate": 1e-4}
    keep = {"train": train, "model": {"name": "m"}, "data": {"task": "glue/sst2"}}
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}, "scheduler": {"params": {"total_num_steps": 9}}}
    result = imported(keep=keep | adam, sparse_pruning=sparse())
    assert result.job["train"] == train and result.missing == ()
    assert parse_job(result.job).leap.target == 0.5


# ------------------------------------------------------------------------------ patterns

MODULES = [
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.1.attention.output.dense",
    "bert.encoder.layer.1.intermediate.dense",
    "bert.encoder.layer.11.output.dense",
    "bert.pooler.dense",
    "weight_net.proj",
    "classifier",
]


@pytest.mark.parametrize(
    "pattern",
    [
        *("attention.self", "encoder.*dense", "dense$", r"layer\.[01]\.", "^bert", "^classifier$", "query|pooler"),
        *(r"layer.\w+.output.dense", "weight", "self.query$|proj", "[$^]x", r"dense\Z", r"\bdense\b", "", r"\$"),
    ],
)
def test_patterns_find_the_weights_of_the_same_modules(pattern: str) -> None:
    """As DeepSpeed looks for them: re.search in the names of modules."""
    ours = re.compile(tensor_pattern(pattern).removeprefix("re:"))
    found = [name for name in MODULES if ours.match(f"{name}.weight")]
    assert found == [name for name in MODULES if re.search(pattern, name)]
    assert not any(ours.match(f"{name}.bias") for name in MODULES)


def test_imported_gates_fit_a_model() -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    from leap_dist.models.plan import make_plan

    model = AutoModelForSequenceClassification.from_config(BertConfig(**MODEL | {"num_hidden_layers": 2}))
    groups = {"hp1": (0.5, [r"layer\.1\.attention.output.dense"])}
    only_heads = imported(head_pruning=section(groups, num_heads=2))
    plan = make_plan(model, parse_leap(only_heads.job["leap"]))
    assert [gate.name for gate in plan.gates] == ["bert.encoder.layer.1.attention.self:head"]
    both = imported(row_pruning=rows(0.5, related=True), head_pruning=heads(0.5))
    kinds = [gate.granularity for gate in make_plan(model, parse_leap(both.job["leap"])).gates]
    assert kinds == ["neuron", "neuron", "head", "head"]
    blocks = imported(sparse_pruning=snip(excluded_modules=["classifier", "intermediate"]))
    tensors = {part.tensor for gate in make_plan(model, parse_leap(blocks.job["leap"])).gates for part in gate.slices}
    assert len(tensors) == 10 and not any("intermediate" in name for name in tensors)


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (BASE, "old.json: compression_training: got nothing; allowed: the object of an old config"),
        (BASE | {"compression_training": 3}, "compression_training: got 3; allowed: the object"),
        (old(sparse_pruning=sparse()) | {"leap": {}}, "old.json: leap: the file has this section already"),
        (old(), "nothing that LEAP prunes is enabled in it; allowed: sparse_pruning, row_pruning, head_pruning, with"),
        (old(channel_pruning=section()), "nothing that LEAP prunes is enabled"),
        (old(sparse_pruning={"shared_parameters": {}}), "nothing that LEAP prunes is enabled"),
        (old(sparse_pruning=[]), "sparse_pruning: got []; allowed: a JSON object"),
        (old(sparse_pruning={"shared_parameters": {"enabled": "yes"}}), '.enabled: got "yes"; allowed: true or false'),
        (old(layer_reduction={"enabled": 1}), "layer_reduction.enabled: got 1; allowed: true or false"),
        (old(sparse_pruning=section()), "sparse_pruning.different_groups: missing; allowed: one or more groups"),
        (old(sparse_pruning=sparse(method="l2")), '.method: got "l2"; allowed: "l1" or "topk" or "snip_momentum"'),
        (old(sparse_pruning=sparse(1.5)), "groups.sp1.params.dense_ratio: got 1.5; allowed: a number, 0 < dense_ratio"),
        (old(sparse_pruning=sparse("half")), 'dense_ratio: got "half"; allowed'),
        (old(sparse_pruning=sparse(0)), "dense_ratio: got 0; allowed"),
        (old(sparse_pruning=sparse(0.5, "*dense")), 'sp1.modules: got "*dense"; not a regular expression: nothing to'),
        (old(sparse_pruning=section({"a": (0.5, [1])})), "a.modules: got [1]; allowed: a list of patterns"),
        (old(sparse_pruning=sparse(schedule_offset="1")), 'schedule_offset: got "1"; allowed: an integer >= 0'),
        (old(sparse_pruning=snip(block_pattern="4y1")), 'block_pattern: got "4y1"; allowed: NxM or N:M'),
        (old(sparse_pruning=snip(block_pattern="4:4")), 'block_pattern: got "4:4"; allowed: NxM or N:M'),
    ],
)
def test_a_mistake_is_one_message(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        import_compression(raw, "old.json")
    assert str(caught.value).startswith("old.json: ")


def test_every_mistake_is_in_one_message() -> None:
    groups = {"a": (2, ["("]), "b": (0.5, ["x"])}
    with pytest.raises(UserError, match=r"^config: 3 problems\n") as caught:
        import_compression(old(sparse_pruning=section(groups, schedule_offset=-1)))
    assert len(str(caught.value).splitlines()) == 4


# ------------------------------------------------------------------------------ the command


def test_the_job_goes_to_stdout_and_what_is_told_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old(sparse_pruning=sparse())), "utf-8")
    assert import_file(file, None) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == BASE | {"leap": {"target": 0.5, "gates": ["element"]}}
    assert printed.err.startswith("note: ") and printed.err.endswith("add: model.name, data.task, train.epochs\n")
    with pytest.raises(UserError, match=r"--output: .*old\.json exists; choose another file, or remove it"):
        import_file(file, file)
    with pytest.raises(UserError, match=r"--output: .* cannot be written: No such file or directory"):
        import_file(file, tmp_path / "none" / "job.json")
    assert list(tmp_path.iterdir()) == [file]


def test_a_job_that_lacks_parts_says_which(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(imported(sparse_pruning=sparse()).job), "utf-8")
    with pytest.raises(UserError, match=r"data\.task: missing") as caught:
        load_job(tmp_path / "job.json")
    assert "got neither of name and from_config" in str(caught.value)
    assert "got neither of epochs and max_steps" in str(caught.value)


def test_mistakes_of_the_call(tmp_path: Path) -> None:
    check_refused(prune(tmp_path, "--import-compression", "none.json"), "none.json: cannot be read: No such file")
    (tmp_path / "bad.json").write_text("{", "utf-8")
    check_refused(prune(tmp_path, "--import-compression", "bad.json"), "bad.json: not JSON: line 1, column 2")
    for more in (["--resume"], ["--set", "a=1"], ["--plan", "2"], ["--config", "bad.json"]):
        run = prune(tmp_path, "--import-compression", "bad.json", *more)
        assert run.returncode == 2 and run.stderr.startswith("usage: ") and "--import-compression" in run.stderr


@pytest.mark.slow
def test_an_imported_job_runs_and_reaches_its_target(tmp_path: Path) -> None:
    sections = {"sparse_pruning": sparse(0.3, "attention.self", "intermediate.dense$", schedule_offset=3)}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    (tmp_path / "old.json").write_text(json.dumps(old(**sections) | {"optimizer": optimizer}), "utf-8")
    run = prune(tmp_path, "--import-compression", "old.json", "--output", "job.json")
    assert (run.returncode, run.stdout) == (0, "job file: job.json\n"), run.stderr
    job = json.loads((tmp_path / "job.json").read_text("utf-8"))
    (tmp_path / "job.json").write_text(json.dumps(trainable(job)), "utf-8")
    run = prune(tmp_path, "--config", "job.json", "--set", "leap.dense_fraction=0.1", "--output", "run")
    assert run.returncode == 0, run.stderr
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text("utf-8"))
    names = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    assert set(certificate["tensors"]) == {f"bert.encoder.layer.0.{name}.weight" for name in names}
    prunable = 3 * 16 * 16 + 16 * 24
    assert certificate["prunable"] == prunable and certificate["unit"] == 1
    assert abs(certificate["kept"] - 0.3 * prunable) <= 1


def test_a_full_disk_leaves_no_part_of_a_job_file(tmp_path: Path, small_disk: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old(sparse_pruning=sparse())), "utf-8")
    fill(small_disk)
    with pytest.raises(UserError, match=r"--output: .*job\.json cannot be written: No space left on device"):
        import_file(file, small_disk / "job.json")
    free(small_disk)
    assert import_file(file, small_disk / "job.json") == 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("fast", r'^train: got "fast"; allowed: a JSON object'),
        ({"max_steps": "1000"}, r'train\.max_steps: got "1000"; allowed: an integer'),
    ],
)
def test_what_a_job_refuses_in_train_is_refused_here(train: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_compression(old(sparse_pruning=sparse(schedule_offset=100)) | {"train": train})
