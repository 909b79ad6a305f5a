"""The interval of the ratio of two timings. What measures them is shared with the arena."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attunement.compare.measure import Case, interleaved, saved_bytes

__all__ = ["Case", "interleaved", "ratio_of", "saved_bytes"]


def ratio_of(times: Mapping[str, np.ndarray], draws: int = 4000) -> tuple[float, float, float, float, float]:
    """(ours, theirs, their ratio, low, high) from medians, with the ratio's 95 % bootstrap interval.

    Where the bare model was timed too (a case "bare"), its median is first taken off both: the ratio of the overheads.
    Rounds are drawn whole, so that what slowed all cases of a round down counts once.
    """
    ours, theirs = times["ours"], times["peft"]
    bare = times.get("bare", np.zeros_like(ours))
    picks = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))  # (draws, rounds)
    a, b, c = (np.median(t[picks], axis=1) for t in (ours, theirs, bare))  # (draws,)
    low, high = np.percentile((a - c) / (b - c), (2.5, 97.5))
    own, other = (float(np.median(t) - np.median(bare)) for t in (ours, theirs))
    return own, other, own / other, float(low), float(high)
