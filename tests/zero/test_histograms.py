"""Histograms of sharded scores equal numpy's over the whole scores, in double precision."""

from typing import Any

import numpy as np
import pytest

from tests.ranks import RankPools
from tests.zero.test_engine import STEPS, pruned_engine, run_steps


def histograms(kind: str, stage: int) -> tuple[list[dict[str, Any]], dict[str, tuple[Any, Any]]]:
    """What is counted after a whole run, and by gate name the whole scores and masks as numpy arrays."""
    from leap_dist.core.gate_values import SCORES
    from leap_dist.core.gating import ELEMENT_MASK, MASK, SCORE
    from leap_dist.core.histograms import score_histograms
    from leap_dist.zero.binding import gather
    from leap_dist.zero.engine import settle

    engine = pruned_engine(kind, stage, 1, {})
    run_steps(engine, 1, 0, STEPS // 4)
    settle(engine)
    gating, plan = engine.leap.gating, engine.leap.plan
    counted = score_histograms(gating, engine.leap.kept_units)
    whole = {}
    units = next(gather(engine, [SCORES]))[1] if plan.num_structured_units else None
    for index, gate in enumerate(plan.gates):
        if not gate.elementwise:
            assert units is not None
            mine = plan.units(index)
            whole[gate.name] = units[mine].numpy(), gating.unit_mask[mine].numpy()
        elif gate.pattern is None:
            name = gate.slices[0].tensor
            key = ELEMENT_MASK if any(map(plan.hybrid, plan.covers)) else MASK
            scores, mask = (next(gather(engine, [name], key))[1].flatten().numpy() for key in (SCORE, key))
            whole[gate.name] = scores, mask
    engine.destroy()
    return counted, whole


@pytest.mark.parametrize(("kind", "stage", "world"), [("hybrid", 3, 2), ("hybrid", 2, 1), ("head+2:4", 3, 2)])
def test_counts_are_those_of_numpy(ranks: RankPools, kind: str, stage: int, world: int) -> None:
    from leap_dist.core.histograms import BINS, REACH

    results = ranks(world).run(histograms, kind, stage)
    counted, whole = results[0]
    assert all(other[0] == counted for other in results)
    assert [gate["name"] for gate in counted] == list(whole) and counted
    for gate in counted:
        scores, mask = (np.asarray(values) for values in whole[gate["name"]])
        scores = scores.astype(np.float64)
        assert gate["units"] == len(scores) and gate["kept_units"] == mask.sum()
        ends = [scores[mask].min(), *([scores[~mask].max()] if not mask.all() else [])]
        assert gate["cut"] == pytest.approx(np.mean(ends)) and gate["spread"] == pytest.approx(scores.std(), rel=1e-9)
        distance = ((scores - gate["cut"]) / gate["spread"]).clip(-REACH, REACH - 1e-9)
        for key, part in (("kept", distance[mask]), ("removed", distance[~mask])):
            assert gate[key] == np.histogram(part, np.linspace(-REACH, REACH, BINS + 1))[0].tolist()
        assert sum(gate["removed"][BINS // 2 :]) == sum(gate["kept"][: BINS // 2]) == 0  # the cut parts them
        if "which" in gate:
            assert gate["which"] == np.flatnonzero(mask).tolist()
    structured = {gate["name"] for gate in counted if "which" in gate}
    assert structured == ({g["name"] for g in counted if g["granularity"] != "element"})
