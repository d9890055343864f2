"""LEAP in DeepSpeed engines against the oracle: every stage, number of ranks, accumulation and granularity.

    python -m tests.bench.equivalence

Prints the largest relative error of any tensor for each case, and writes results/equivalence.json. The test suite
runs a part of these cases.
"""

import json
from pathlib import Path

from tests.peers.nets import GATES
from tests.ranks import RankPools
from tests.zero.test_engine import compare, final_weights, oracle_weights


def main() -> None:
    """Run the whole grid."""
    errors: dict[str, float] = {}
    with RankPools() as ranks:
        for kind in GATES:
            expected = oracle_weights(kind, {})
            for world in (1, 2, 3):
                for stage in range(4):
                    for accumulation in (1, 3):
                        results = ranks(world).run(final_weights, kind, stage, accumulation, {})
                        name = f"{kind} stage {stage} ranks {world} accumulation {accumulation}"
                        errors[name] = compare(results, expected)
                        print(f"{name}: {errors[name]:.1e}", flush=True)
    worst = max(errors, key=lambda name: errors[name])
    print(f"{len(errors)} cases, the largest error is {errors[worst]:.1e} ({worst})")
    target = Path(__file__).parent / "results" / "equivalence.json"
    target.write_text(json.dumps(errors, indent=1) + "\n")


if __name__ == "__main__":
    main()
