"""Gates of the residual stream and of layers equal the oracle, also on matrices covered by rows and by columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.config.job_file import parse_leap
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import whole
from leap_dist.core.gating import SCORE
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.core.oracle import Oracle
from leap_dist.models.inputs import resolve_start
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.plan import make_plan
from leap_dist.zero.listener import Listener
from tests.models.tiny import DEEPER, tiny
from tests.peers.nets import relative_error

pytestmark = pytest.mark.slow

STEPS = 16
CASES: list[tuple[str, str, list[str], str]] = [
    ("bert", "AutoModelForSequenceClassification", ["hidden", "head", "neuron"], "gradient"),
    ("bert", "AutoModelForSequenceClassification", ["depth", "element"], "gradient"),
    ("llama", "AutoModelForCausalLM", ["hidden", "head", "neuron"], "gradient"),
]


@pytest.mark.parametrize(("kind", "head", "gates", "start"), CASES)
def test_equals_the_oracle(kind: str, head: str, gates: list[str], start: str) -> None:
    leap = {"target": 0.4, "gates": gates, "total_steps": STEPS, "score_init": "auto", "dense_fraction": 0.2}
    config = parse_leap(leap)
    changes = DEEPER[kind] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny(kind, head, "eager", **changes)
    reference = copy.deepcopy(model)
    plan = make_plan(model, config)
    resolved = resolve_start(model, plan, config)
    assert resolved.config.score_init == start
    named = dict(model.named_parameters())
    no_decay = [name for name in plan.covers if not plan.counted(name)]
    gated = {"params": [p for n, p in named.items() if n in plan.covers], GATED: True, "no_decay": frozenset(no_decay)}
    groups: list[dict[str, Any]] = [gated, {"params": [p for n, p in named.items() if n not in plan.covers]}]
    optimizer = LeapAdamW(groups, plan, resolved.config, lr=3e-3, weight_decay=0.1, axes=resolved.axes)
    optimizer.bind(whole(named.items()), Communicator())
    if optimizer.inputs is not None:
        Listener(model, optimizer.inputs, on=True)
    oracle = Oracle(reference, plan, resolved.config, 3e-3, 0.1, no_decay=no_decay)
    for each in (model, reference):
        compute_among_kept(each.train(), gates, plan.covers)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(3, 64, (4, 10), generator=generator)
        batch = {"input_ids": tokens, "labels": tokens if "CausalLM" in head else tokens[:, 0] % 2}
        oracle.step(lambda forward, batch=batch: forward(**batch).loss)
        model.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # it changes nothing, so that its gradient is rounding alone
            assert relative_error(parameter, expected[name]) <= 1e-4, name
        assert torch.equal(parameter == 0, expected[name] == 0), name
    assert optimizer.settled
    assert abs(optimizer.kept_weights - 0.4 * plan.prunable) <= plan.unit
    assert (SCORE in optimizer.gating.keys) == ("element" in gates)
