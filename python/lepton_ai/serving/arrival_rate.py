"""ArrivalRate: how many requests a second arrive now, from counts, with bounds, a trend and changes told from noise."""

import math
from dataclasses import dataclass

import numpy as np

_MEMORY = 1800.0  # seconds of steady arrivals that are remembered
_MOST_SPANS = 512  # of which there are counts; then those of the older half are added up in pairs, as ADWIN's are
_LEAST_SPAN = 0.5  # seconds: counts over less are added up
_LEAST_COUNTS = 10  # that tell how much they vary
_UNKNOWN_DISPERSION = 4.0  # taken before there are as many: requests come in groups of four, say
_LEAST_TREND = 10.0  # seconds in which a trend can be seen
# A change is one that steady arrivals show with a chance of some e^-20 at a given moment: in five minutes of samples a
# second apart, each looked at for changes at up to 512 moments, about 1 in 3000.
_CHANGE = 20.0
DEVIATIONS = 4.0  # of a bound from the estimate


@dataclass(frozen=True)
class Rate:
    """requests: as counted over `seconds` since the last change. dispersion: variance over mean of counts, 1 or more.

    growth: requests a second that come on top every second, at least, as far as it can be told from noise; 0 for none.
    """

    requests: float
    seconds: float
    dispersion: float
    growth: float

    @property
    def per_second(self) -> float:
        """The mean over these seconds."""
        return self.requests / self.seconds if self.seconds else 0.0


class ArrivalRate:
    """Estimates a rate over a window that grows while arrivals are steady and is cut where they changed.

    A window that ends where its newest part no longer fits the rest is ADWIN's idea (Bifet and Gavaldà, "Learning from
    time-changing data with adaptive windowing", SIAM Data Mining 2007). What fits is told by the generalized likelihood
    ratio of one or two Poisson rates (Siegmund and Venkatraman, "Using the generalized likelihood ratio statistic for
    sequential detection of a change-point", Annals of Statistics 23, 1995), divided by the counts' dispersion, since
    arrivals are often burstier than Poisson. So the window needs no length to be set: a tenfold step at ten requests a
    second is seen within a second, and a steady one in ten seconds is no wobble.
    """

    def __init__(self) -> None:
        self._spans: list[float] = []
        self._counts: list[float] = []
        self._known_dispersion = _UNKNOWN_DISPERSION

    def add(self, seconds: float, arrivals: float) -> Rate:
        """So many arrivals in the next `seconds` (more than 0); what is known with them."""
        if self._spans and self._spans[-1] < _LEAST_SPAN:
            self._spans[-1] += seconds
            self._counts[-1] += arrivals
        else:
            self._spans.append(seconds)
            self._counts.append(arrivals)
        if len(self._spans) > _MOST_SPANS:
            half = _MOST_SPANS // 2
            for values in (self._spans, self._counts):
                values[:half] = [a + b for a, b in zip(values[:half:2], values[1:half:2], strict=True)]
        forgotten = self._older() or (len(self._spans) > 1 and sum(self._spans) - self._spans[0] >= _MEMORY)
        del self._spans[:forgotten], self._counts[:forgotten]
        return self._rate()

    def _older(self) -> int:
        """How many counts are from before the newest change."""
        if len(self._spans) < 2:
            return 0
        spans, counts = np.array(self._spans), np.array(self._counts)
        before, n = spans.cumsum(), counts.cumsum()
        total, all_n = before[-1], n[-1]
        if all_n == 0:
            return 0
        before, n = before[:-1], n[:-1]
        after, m = total - before, all_n - n
        # x ln x is 0 for 0; the logarithm's argument is kept off it.
        ratio = n * np.log(np.maximum(n, 1e-300) * total / (before * all_n))
        ratio += m * np.log(np.maximum(m, 1e-300) * total / (after * all_n))
        cut = int(ratio.argmax()) + 1
        # Only what was before the change tells how much counts vary without one.
        if ratio[cut - 1] > _CHANGE * self._dispersion(spans[:cut], counts[:cut]):
            return cut
        return 0

    def _rate(self) -> Rate:
        spans, counts = np.array(self._spans), np.array(self._counts)
        seconds, requests = float(spans.sum()), float(counts.sum())
        dispersion = self._known_dispersion = self._dispersion(spans, counts)
        growth = 0.0
        if seconds >= _LEAST_TREND and requests:
            # Least squares weighted by the spans; its standard error is that of counts of the mean rate.
            time = spans.cumsum() - spans / 2
            time -= (time * spans).sum() / seconds
            spread = float((spans * time**2).sum())
            if spread > 0:
                slope = float((time * counts).sum()) / spread
                error = math.sqrt(dispersion * requests / seconds / spread)
                growth = max(0.0, slope - DEVIATIONS * error)
        return Rate(requests, seconds, dispersion, growth)

    def _dispersion(self, spans: np.ndarray, counts: np.ndarray) -> float:
        """Pearson's estimate of variance over mean of the counts, at least 1; what was known where they are too few."""
        if len(counts) < _LEAST_COUNTS or counts.sum() == 0:
            return self._known_dispersion
        mean = spans * (counts.sum() / spans.sum())
        return max(1.0, float(((counts - mean) ** 2 / mean).sum()) / (len(counts) - 1))
