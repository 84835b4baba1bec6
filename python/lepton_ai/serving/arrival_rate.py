"""ArrivalRate: how many requests a second arrive now, from counts, with bounds, a trend and changes told from noise."""

import math
from dataclasses import dataclass

import numpy as np

_MEMORY = 600.0  # seconds that are remembered at most
_LEAST_SPAN = 0.5  # seconds: counts over less are added up
_LEAST_COUNTS = 10  # that tell how much they vary
_UNKNOWN_DISPERSION = 4.0  # taken before there are as many: requests come in groups of four, say
_LEAST_TREND = 10.0  # seconds in which a trend can be seen
_TREND_DEVIATIONS = 4.0  # of a slope from its least value
# A change is one that steady arrivals show with a chance of some e^-20 at a given moment: in five minutes of samples a
# second apart, each looked at for changes at up to 300 moments, about 1 in 5000.
_CHANGE = 20.0


@dataclass(frozen=True)
class Rate:
    """What is known of a rate that is steady, or rises or falls steadily, for `seconds`.

    requests: as counted in them; for a trend, as many as tell its present rate as exactly. per_second: now. dispersion:
    variance over mean of counts, 1 or more. growth: requests a second that come on top every second, at least; 0 for
    none.
    """

    requests: float
    per_second: float
    seconds: float
    dispersion: float
    growth: float

    def bounds(self, below: float, above: float) -> tuple[float, float]:
        """The least and greatest rate, so many standard deviations off.

        By the square root of the count, whose deviation is 1/2 at any rate (Bartlett, "The square root transformation
        in analysis of variance", Supplement to the Journal of the Royal Statistical Society 3, 1936). Both 0 where
        nothing came.
        """
        if self.requests == 0:
            return 0.0, 0.0
        deviation = math.sqrt(self.dispersion / self.requests) / 2
        return self.per_second * max(0.0, 1 - below * deviation) ** 2, self.per_second * (1 + above * deviation) ** 2

    def rise(self, ahead: float) -> float:
        """Requests a second more in `ahead` seconds; a trend is followed no further than it was seen."""
        return self.growth * min(ahead, self.seconds)


class ArrivalRate:
    """Estimates a rate over a window that grows while one rate or one trend explains the counts, and is cut where not.

    A window that ends where its newest part no longer fits the rest is ADWIN's idea (Bifet and Gavaldà, "Learning from
    time-changing data with adaptive windowing", SIAM Data Mining 2007). What fits is told by the generalized likelihood
    ratio of one or two Poisson rates (Siegmund and Venkatraman, "Using the generalized likelihood ratio statistic for
    sequential detection of a change-point", Annals of Statistics 23, 1995), divided by the counts' dispersion, since
    arrivals are often burstier than Poisson. A line is taken instead of a cut where it is likelier and nothing is left
    to explain. So no length has to be set: a tenfold step at ten requests a second is seen within a second, and ten
    seconds of noise are none.
    """

    def __init__(self) -> None:
        self._spans = np.empty(0)
        self._counts = np.empty(0)
        self._known_dispersion = _UNKNOWN_DISPERSION

    def add(self, seconds: float, arrivals: float) -> Rate:
        """So many arrivals in the next `seconds` (more than 0); what is known with them."""
        if len(self._spans) and self._spans[-1] < _LEAST_SPAN:
            self._spans[-1] += seconds
            self._counts[-1] += arrivals
        else:
            self._spans, self._counts = np.append(self._spans, seconds), np.append(self._counts, arrivals)
        while len(self._spans) > 1 and self._spans[1:].sum() >= _MEMORY:
            self._forget(1)
        spans, counts = self._spans, self._counts
        line, slope = _line(spans, counts)
        trend, (gain, cut) = False, _best_cut(spans, counts)
        # Only what was before a change tells how much counts vary without one.
        if gain > _CHANGE * self._dispersion(spans[:cut], counts[:cut]):
            left, other = _best_cut(line * spans, counts)
            # Half, as a line that has ended draws the rate out to where it is not.
            trend = left <= _CHANGE / 2 * self._dispersion(spans[:other], counts[:other])
            trend = trend and _gain(line * spans, spans, counts) > gain
            if not trend:
                self._forget(cut)
                spans, counts = self._spans, self._counts
                line, slope = _line(spans, counts)
        total, requests = float(spans.sum()), float(counts.sum())
        dispersion = self._known_dispersion = self._dispersion(spans, counts)
        growth = 0.0
        if total >= _LEAST_TREND and len(spans) > 2:
            time = spans.cumsum() - spans / 2
            spread = float((spans * (time - (time * spans).sum() / total) ** 2).sum())
            growth = max(0.0, slope - _TREND_DEVIATIONS * math.sqrt(dispersion * requests / total / spread))
        if trend:  # the variance at a line's end is four times that of a mean
            return Rate(float(line[-1]) * total / 4, float(line[-1]), total, dispersion, growth)
        return Rate(requests, requests / total, total, dispersion, growth)

    def _forget(self, oldest: int) -> None:
        self._spans, self._counts = self._spans[oldest:].copy(), self._counts[oldest:].copy()

    def _dispersion(self, spans: np.ndarray, counts: np.ndarray) -> float:
        """Variance over mean, at least 1, by differences of neighbours, which a trend leaves alone.

        Where there are too few, what was known before. Source:
        von Neumann, "Distribution of the ratio of the mean square successive difference to the variance", Annals of
        Mathematical Statistics 12, 1941.
        """
        if len(counts) < _LEAST_COUNTS or counts.sum() == 0:
            return self._known_dispersion
        square = np.diff(counts / spans) ** 2 / (1 / spans[1:] + 1 / spans[:-1])
        return max(1.0, float(square.mean() * spans.sum() / counts.sum()))


def _line(spans: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float]:
    """The rate at the middle of each span by least squares, kept over a hundredth of the mean, and its slope."""
    total, mean = spans.sum(), counts.sum() / spans.sum()
    time = spans.cumsum() - spans / 2
    time -= (time * spans).sum() / total
    spread = (spans * time**2).sum()
    slope = float((time * counts).sum() / spread) if spread > 0 else 0.0
    return np.maximum(mean + slope * time, mean / 100), slope


def _gain(expected: np.ndarray, other: np.ndarray, counts: np.ndarray) -> float:
    """How much likelier Poisson counts are with expectations in these proportions than in others."""
    seen = counts > 0
    ratio = expected[seen] / expected.sum() * other.sum() / other[seen]
    return float((counts[seen] * np.log(ratio)).sum())


def _best_cut(expected: np.ndarray, counts: np.ndarray) -> tuple[float, int]:
    """How much likelier counts are with two factors of what is expected than with one, and how many have the first."""
    before, n = expected.cumsum(), counts.cumsum()
    total, all_n = before[-1], n[-1]
    if len(counts) < 2 or all_n == 0:
        return 0.0, 0
    before, n = before[:-1], n[:-1]
    after, m = total - before, all_n - n
    # x ln x is 0 for 0; the logarithm's argument is kept off it.
    ratio = n * np.log(np.maximum(n, 1e-300) * total / (before * all_n))
    ratio += m * np.log(np.maximum(m, 1e-300) * total / (after * all_n))
    cut = int(ratio.argmax())
    return float(ratio[cut]), cut + 1
