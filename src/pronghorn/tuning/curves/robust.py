"""Statistics that single steps do not move: medians, median deviations, slopes of pairs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

#: A normal distribution's standard deviation over its median absolute deviation.
_MAD_TO_SIGMA = 1.4826
#: Standard error of a median over that of a mean, for normal noise.
MEDIAN_ERROR = 1.2533


def logarithms(losses: np.ndarray) -> np.ndarray:
    """Of losses, whose noise is about proportional to them. A loss of a millionth of a nat is as good as none."""
    return np.log(np.maximum(losses, 1e-6))


def spread(values: np.ndarray) -> float:
    """A standard deviation out of the median absolute deviation."""
    return float(_MAD_TO_SIGMA * np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def noise(values: np.ndarray) -> float:
    """Standard deviation of what is not trend, from differences of neighbours: a trend moves those little."""
    return spread(np.diff(values)) / np.sqrt(2) if len(values) > 2 else 0.0


def trailing(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Median and `spread` of the `width` values before each one from index `width` on; both [n - width]."""
    windows = sliding_window_view(values, width)[:-1]
    medians = np.median(windows, axis=1)
    return medians, _MAD_TO_SIGMA * np.median(np.abs(windows - medians[:, None]), axis=1)


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Medians of `width` neighbours, [n - width + 1]; entry i is of values i … i + width - 1."""
    return np.asarray(np.median(sliding_window_view(values, width), axis=1))


def total_change(values: np.ndarray, blocks: int = 24) -> tuple[float, float]:
    """How much values change from the first to the last along a straight line, and the standard error of that.

    The line is Theil and Sen's through the medians of blocks: the median slope of all pairs. Its error is that of least
    squares over n values with the same noise, times a median's:  1.25 σ √(12 / n).
    """
    count = min(blocks, len(values))
    bounds = np.linspace(0, len(values), count + 1).astype(int)
    medians = np.array([np.median(values[a:b]) for a, b in pairwise(bounds)])
    centres = (bounds[:-1] + bounds[1:] - 1) / 2
    first, second = np.triu_indices(count, k=1)
    slopes = (medians[second] - medians[first]) / (centres[second] - centres[first])
    error = MEDIAN_ERROR * noise(values) * np.sqrt(12 / len(values))
    return float(np.median(slopes) * (len(values) - 1)), float(error)


def _shortest(lags: np.ndarray, lag: int, least: int) -> int:
    """The lag, or the part of it that correlates nearly as well: of a swing of 24 steps noise may hide all but 72."""
    for parts in range(lag // max(least, 1), 1, -1):
        middle, reach = round(lag / parts), max(lag // (8 * parts), 1)
        around = np.arange(max(middle - reach, least + 1), middle + reach + 1)
        if len(around) and lags[around].max() > 0.8 * lags[lag]:
            return int(around[np.argmax(lags[around])])
    return lag


def period(values: np.ndarray) -> tuple[int, float] | None:
    """(length, amplitude) of a swing that repeats at least three times in `values`, or None.

    By the autocorrelation of what a parabola leaves over: it must fall below -0.3 and come back above 0.4 + 2.5/√n.
    Noise of n values has autocorrelations of about 1/√n; a trend that a parabola misses has no second rise.
    """
    count = len(values)
    at = np.linspace(-1, 1, count)
    rest = values - np.polynomial.Polynomial.fit(at, values, 2)(at)
    limit = 4 * max(spread(rest), 1e-12)
    rest = np.clip(rest, -limit, limit)
    power = np.abs(np.fft.rfft(rest, 2 * count)) ** 2
    correlation = np.fft.irfft(power)[:count]
    if correlation[0] <= 0:
        return None
    # Each lag over its own number of pairs, so that a long period is not held against itself.
    correlation = correlation / correlation[0] * count / np.arange(count, 0, -1)
    lags = correlation[: count // 3 + 1]
    below = np.flatnonzero(lags < -0.3)
    if not len(below):
        return None
    high = np.flatnonzero(lags[below[0] :] > 0.4 + 2.5 / np.sqrt(count)) + below[0]
    if not len(high):
        return None
    # The first stretch above: at twice the length and three times it is as high again.
    ends = np.flatnonzero(np.diff(high) > 1)
    first = high[: ends[0] + 1] if len(ends) else high
    lag = _shortest(lags, int(first[np.argmax(lags[first])]), int(below[0]))
    return lag, float(np.sqrt(2 * max(lags[lag], 0.0)) * np.std(rest))
