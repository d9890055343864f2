"""Exact top-k over shards: the same mask for any number of ranks and any split, ties included."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.bench.jumps import most_held
from leap_dist.core.brackets import ANYWHERE, Bracket
from leap_dist.core.communicator import Communicator
from leap_dist.core.digits import ScoreRuns, to_scores
from leap_dist.core.oracle import top_k
from leap_dist.core.select import NUM_SUMS, Selector, most_bytes
from leap_dist.ops import dispatch
from leap_dist.ops.reference import CPU_BLOCK, LENGTH, run_table, to_keys
from tests.ranks import RankPools

SIZES = [1, 2, 1001, 5000]


def scores_at(step: int, kind: str) -> list[Tensor]:
    """The scores of every gate at a step, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    start = [torch.randn(n, generator=generator) for n in SIZES]
    drift = [0.01 * torch.randn(n, generator=generator) for n in SIZES]
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "normal": lambda s: s,
        "ties": lambda s: (s * 4).round() / 4,
        "zeros": lambda s: torch.where(s > 0, 0.0, -0.0),
        "jumps": lambda s: s * 10 ** (step % 5),
        "infinite": lambda s: torch.where(s > 1, float("inf"), s),
        "equal": lambda s: torch.full_like(s, -0.25),
        "sorted": lambda s: s.sort().values,
        "denormals": lambda s: (s * 1000).round().abs() * 1e-45,
        "two values": lambda s: (s > 0.3).float(),
        "close": lambda s: 1 + (s * 4000).round() * 2.0**-23,  # told apart by their last bits, if at all
    }
    return [kinds[kind](s + step * d) for s, d in zip(start, drift, strict=True)]


def pieces(size: int, world: int, split: str) -> list[list[tuple[int, int]]]:
    """(start, stop) runs of one gate for every rank; together they cover it once."""
    if split == "even":
        edges = [size * r // world for r in range(world + 1)]
    elif split == "last":  # all on the last rank
        edges = [0] * world + [size]
    else:  # in small runs, dealt like cards
        cuts = sorted({0, size, *range(0, size, max(size // 7, 1))})
        runs = list(itertools.pairwise(cuts))
        return [runs[r::world] for r in range(world)]
    return [[(edges[r], edges[r + 1])] if edges[r] < edges[r + 1] else [] for r in range(world)]


def one_run(gate: int, scores: Tensor, place: int) -> ScoreRuns:
    """One fragment as a buffer of its own, in rows of odd length."""
    return ScoreRuns(scores, torch.ones_like(scores, dtype=torch.bool), run_table([(0, len(scores), gate, place)], 777))


STEADY = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15)
JUMPS = (1.0, 0.2, 0.95, 1e-5, 0.6, 0.2)  # up and down, from cold brackets and from warm ones


def select_everywhere(kind: str, split: str, levels: tuple[float, ...] = STEADY) -> bool:
    """On every rank: do the masks of its runs equal those of a full sort, at every level?"""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    communicator = Communicator(torch.distributed.group.WORLD) if world > 1 else Communicator()
    table = [(gate, *run) for gate, n in enumerate(SIZES) for part in pieces(n, world, split) for run in part]
    table.sort()
    mine = {(gate, *run) for gate, n in enumerate(SIZES) for run in pieces(n, world, split)[rank]}
    selector = Selector(SIZES, [gate for gate, _, _ in table], communicator)
    for step, level in enumerate(levels):
        scores = scores_at(step, kind)
        local = [entry for entry in table if entry in mine]
        runs = [one_run(g, scores[g][a:b].clone(), table.index((g, a, b))) for g, a, b in local]
        keep = [max(1, int(n * level)) for n in SIZES]
        selector.masks_(runs, keep)
        masks = [run.mask for run in runs]
        expected = [top_k(s, k) for s, k in zip(scores, keep, strict=True)]
        if not all(torch.equal(m, expected[g][a:b]) for m, (g, a, b) in zip(masks, local, strict=True)):
            return False
    return True


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda s: s,
    "equal": lambda s: torch.full_like(s, 0.25),
    "two values": lambda s: (s > 0.3).float(),
    "denormals": lambda s: (s * 1000).round().abs() * 1e-45,
    "sorted": lambda s: s.sort().values,
    "ties": lambda s: (s * 4).round(),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_level_that_jumps_gives_the_masks_of_a_full_sort(kind: str) -> None:
    """One large gate, and small ones in a buffer of their own."""
    sizes = [100_000, 1000, 50]
    scores = [SHAPES[kind](torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in sizes]
    selector = Selector(sizes, [0, 1, 2], Communicator())
    table = run_table([(0, 1000, 1, 1), (1000, 50, 2, 2)], 777)
    for share in (1.0, 0.99, 0.2, 0.6, 1e-5):
        keep = [max(1, int(share * n)) for n in sizes]
        small = ScoreRuns(torch.cat(scores[1:]), torch.ones(1050, dtype=torch.bool), table)
        large = ScoreRuns(scores[0], torch.ones(sizes[0], dtype=torch.bool), run_table([(0, sizes[0], 0, 0)], 4096))
        selector.masks_([large, small], keep)
        assert torch.equal(large.mask, top_k(scores[0], keep[0]))
        assert torch.equal(small.mask, torch.cat([top_k(s, k) for s, k in zip(scores[1:], keep[1:], strict=True)]))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["even", "last", "cards"])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "jumps", "infinite", "equal", "close"])
def test_masks_equal_a_full_sort(ranks: RankPools, world: int, split: str, kind: str) -> None:
    assert ranks(world).run(select_everywhere, kind, split) == [True] * world


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "kind", ["normal", "ties", "zeros", "infinite", "equal", "sorted", "denormals", "two values", "close"]
)
def test_a_level_that_jumps_does_so_on_ranks(ranks: RankPools, world: int, kind: str) -> None:
    assert ranks(world).run(select_everywhere, kind, "cards", JUMPS) == [True] * world


@pytest.mark.parametrize("size", [1, 3, 100, 10**6])
def test_one_buffer_of_many_gates_and_a_gap(size: int) -> None:
    """Several gates in one buffer, two fragments of one gate in it, cut to rows of any size; the gap is left alone."""
    scores = (torch.randn(900, generator=torch.Generator().manual_seed(3)) * 3).round()
    parts = [(0, 300, 1, 1), (310, 290, 0, 0), (600, 300, 1, 2)]  # offset, length, gate, place
    mask = torch.ones(900, dtype=torch.bool)
    selector = Selector([290, 600], [0, 1, 1], Communicator())
    for keep in ([10, 599], [200, 30], [290, 1]):
        selector.masks_([ScoreRuns(scores, mask, run_table(parts, size))], keep)
        second = torch.cat([scores[:300], scores[600:]])
        assert torch.equal(mask[310:600], top_k(scores[310:600], keep[0]))
        assert torch.equal(torch.cat([mask[:300], mask[600:]]), top_k(second, keep[1]))
        assert mask[300:310].all()


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "infinite", "few values"])
@pytest.mark.parametrize("keep", [1, 12_345, 99_999, 100_000])
def test_a_large_gate_is_aimed_at_first(kind: str, keep: int) -> None:
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(5))
    kinds = {
        "normal": scores,
        "ties": scores.round(),
        "zeros": torch.zeros_like(scores),
        "infinite": torch.where(scores > 1, float("inf"), scores),
        "few values": (torch.arange(100_000) % 64).float(),  # in step with the sample: it sees one value
    }
    run = one_run(0, kinds[kind].clone(), 0)
    Selector([100_000], [0], Communicator()).masks_([run], [keep])
    assert torch.equal(run.mask, top_k(kinds[kind], keep))


def test_masks_equal_a_full_sort_on_five_ranks(ranks: RankPools) -> None:
    assert ranks(5).run(select_everywhere, "ties", "cards") == [True] * 5


def collectives_of_a_step(num_gates: int, num_units: int) -> int:
    """Collectives of a selection whose brackets hold."""
    communicator = Communicator(torch.distributed.group.WORLD)
    rank = torch.distributed.get_rank()
    table = [(gate, part) for gate in range(num_gates) for part in range(2)]
    selector = Selector([2 * num_units] * num_gates, [gate for gate, _ in table], communicator)
    generator = torch.Generator().manual_seed(rank)
    scores = [torch.randn(num_units, generator=generator) for _ in range(num_gates)]
    before = 0
    for _ in range(3):
        before = communicator.num_collectives
        selector.masks_([one_run(g, s, 2 * g + rank) for g, s in enumerate(scores)], [num_units] * num_gates)
    return communicator.num_collectives - before


def test_the_number_of_collectives_depends_on_nothing(ranks: RankPools) -> None:
    small = ranks(2).run(collectives_of_a_step, 1, 100)
    large = ranks(2).run(collectives_of_a_step, 40, 1000)
    assert small == large == [NUM_SUMS, NUM_SUMS]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_selection_takes_two_bytes_a_score_and_few_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold, after jumps either way, and from step to step; whatever the scores."""
    num, num_gates = 3_000_000, 40
    scores = SHAPES[kind](torch.randn(num, generator=torch.Generator().manual_seed(1)))
    size = num // num_gates
    table = run_table([(gate * size, size, gate, gate) for gate in range(num_gates)], CPU_BLOCK)
    run = ScoreRuns(scores, torch.ones(num, dtype=torch.bool), table)
    passed: list[int] = []
    for name in ("count_inside", "take_inside", "cut_"):
        op = getattr(dispatch, name)

        def counted(rows: Tensor, *rest: Any, op: Any = op) -> Any:
            passed.append(int(rows[:, LENGTH].sum()))
            return op(rows, *rest)

        monkeypatch.setattr(dispatch, name, counted)
    selector = Selector([size] * num_gates, list(range(num_gates)), Communicator())
    for share in (0.9, 0.2, 0.2, 0.6):
        passed.clear()
        held = most_held(lambda share=share: selector.masks_([run], [int(share * size)] * num_gates))  # type: ignore[misc]
        assert held < 2 * num and held < most_bytes(num, num_gates)
        assert sum(passed) <= 6 * num
    assert torch.equal(run.mask[:size], top_k(scores[:size], int(0.6 * size)))


def test_nan_scores_are_an_error() -> None:
    scores = torch.randn(10)
    scores[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gates \[0\] hold NaN"):
        Selector([10], [0], Communicator()).masks_([one_run(0, scores, 0)], [10])


def test_a_bracket_follows_its_cut_and_recovers() -> None:
    bracket = Bracket()
    assert bracket.edges == ANYWHERE
    for cut in (1.0, 1.25, 1.5, 1.75):
        bracket.follow(cut)
    low, high = bracket.edges
    assert low < 2.0 < high and bracket.middle == 2.0
    bracket.follow(float("inf"))
    assert bracket.edges == ANYWHERE
    bracket.follow(2.0)
    assert bracket.edges[0] < 2.0 < bracket.edges[1] < 2.2


def test_keys_keep_the_order_of_scores() -> None:
    values = [float("-inf"), -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.5, 3e38, float("inf")]
    scores = torch.tensor(values)
    keys = to_keys(scores)
    assert keys.tolist() == sorted(keys.tolist()) and keys.unique().numel() == len(values) - 1
    assert torch.equal(to_scores(keys), scores + 0.0)
    assert int(keys.min()) >= 0 and int(keys.max()) < 2**32
