"""Where the cut of a gate is: expected from its last places, and what is known while it is searched. Host numbers."""

import math
from dataclasses import dataclass

from leap_dist.core.digits import HIGHEST, LOWEST

WIDEN = 6.0  # a bracket reaches this many times the last error of its prediction to either side
ANYWHERE = -math.inf, math.inf  # the edges of a bracket that is not known
FEW, SMALL = 8, 1 << 10  # collected are at most 1 in so many scores of a gate, or so few: each takes 4 bytes
MOST_TRIES = 6  # counts after which a search halves the keys, which ends whatever the scores


@dataclass
class Bracket:
    """Where the next cut is expected: middle +- width; infinite width means anywhere. cut: the last one, or NaN.

    crowded: so many scores equalled the last cut that none of them is worth collecting: it is tried alone.
    """

    middle: float = 0.0
    width: float = float("inf")
    cut: float = float("nan")
    crowded: bool = False

    @property
    def edges(self) -> tuple[float, float]:
        """(low, high); all scores lie between infinite ones, and NaN counts as not known."""
        if self.crowded and not math.isnan(self.cut):
            return self.cut, self.cut
        low, high = self.middle - self.width, self.middle + self.width
        return (low, high) if low <= high else ANYWHERE

    def follow(self, cut: float) -> None:
        """Expect the cut to move on as it has moved; the width follows the error of the last expectation."""
        error = abs(cut - self.middle)
        known = math.isfinite(error) and not math.isnan(self.cut)
        self.width = max(WIDEN * error, 0.8 * self.width, 1e-7) if known else abs(cut) / 16 + 1e-6
        self.middle = 2 * cut - self.cut if known else cut
        self.cut = cut


@dataclass
class Hunt:
    """What is known of one gate's cut: its key lies in [low, high], as those of `inside` scores; `above` lie higher.

    keep, num: kept and all scores of the gate; counted: `inside` was counted between just these edges; sampled: these
    edges came from a sample; tries: counts so far; broken: counts that contradict each other, which NaN brings about.
    """

    keep: int
    num: int
    low: int = LOWEST
    high: int = HIGHEST
    above: int = 0
    inside: int = 0
    counted: bool = False
    sampled: bool = False
    tries: int = 0
    broken: bool = False

    def __post_init__(self) -> None:
        self.inside = self.num

    @property
    def few(self) -> bool:
        """Whether the scores inside may be collected."""
        return self.inside <= max(self.num // FEW, SMALL)

    @property
    def done(self) -> bool:
        """Whether the cut is one value, or inside a bracket that holds few scores."""
        return self.low >= self.high or (self.counted and self.few)

    @property
    def need(self) -> int:
        """How many of the scores inside are kept."""
        return self.keep - self.above

    @property
    def wants_sample(self) -> bool:
        """Whether a sample says best where to count next."""
        return self.num > SMALL and self.tries < MOST_TRIES and not (self.counted and self.sampled)

    def next_edges(self) -> tuple[int, int]:
        """Where to count next, without a sample.

        After a sample only scores that equal an edge can be so many: the keys between the edges are tried then.
        """
        if self.tries >= MOST_TRIES:
            return (self.low + self.high) // 2 + 1, self.high
        if not (self.counted and self.sampled):
            return self.low, self.high
        self.sampled = False
        return min(self.low + 1, self.high), max(self.high - 1, self.low + 1)

    def learn(self, low: int, high: int, above: int, inside: int) -> None:
        """What a count says: of scores above high, and of those in [low, high], a part of what was known."""
        self.tries += 1
        self.counted = False
        self.broken |= (low, high) == (self.low, self.high) and (above, inside) != (self.above, self.inside)
        if self.keep <= above:
            self.low, self.inside = high + 1, above - self.above
        elif self.keep > above + inside:
            self.high, self.inside = low - 1, self.above + self.inside - above - inside
            self.above = above + inside
            self.broken |= self.high < LOWEST
        else:
            self.low, self.high, self.above, self.inside = low, high, above, inside
            self.counted = True
