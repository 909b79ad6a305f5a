"""How many dimensions a task needs: the smallest random subspace in which training gets most of the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from attunement.adapter import Adapter
from attunement.adapting import adapt
from attunement.errors import AttunementError
from attunement.methods.spectral.said import SAID


class IntrinsicDimension(NamedTuple):
    """What `intrinsic_dimension` measured.

    Attributes:
        size: the smallest number of dimensions that reached the target, None where none of those tried did.
        target: the score that was to be reached.
        scores: the score of each size that was tried.
    """

    size: int | None
    target: float
    scores: dict[int, float]


def intrinsic_dimension(
    model: nn.Module,
    score: Callable[[Adapter], float],
    full: float,
    *,
    share: float = 0.9,
    sizes: Sequence[int] = (10, 30, 100, 300, 1000, 3000, 10_000),
    on: Any = None,
    structured: bool = True,
    seed: int = 0,
) -> IntrinsicDimension:
    """The number of dimensions that a task needs on a model: d90 where `share` is 0.9 (https://arxiv.org/abs/1804.08838).

    It trains the model in random subspaces (`SAID`) of some of the sizes, by bisection: scores are taken to grow with the
    size. The model is left as it was. A task head trains along, as beside every adapter, and is not counted.

    Args:
        score: trains the adapter that it is given, which stands on the model, and says how well the model then does.
        full: the score of a model of which everything is trained.
        share: of `full` that is to be reached; positive scores are assumed.
        sizes: those to choose from, ascending.
        on: the matrices that move; by default those of attentions and feed-forward networks.
        structured, seed: as in `SAID`.

    Raises:
        AttunementError: sizes that do not ascend, a share outside (0, 1], a score that is not finite, or what `adapt` refuses.
    """
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise AttunementError(f"intrinsic_dimension: sizes must ascend, got {list(sizes)}")
    if not 0 < share <= 1:
        raise AttunementError(f"intrinsic_dimension: share must be above 0 and at most 1, got {share}")
    scores: dict[int, float] = {}
    low, high = 0, len(sizes)  # what is left of low falls short, and what is from high on does not
    while low < high:
        middle = (low + high) // 2
        size = sizes[middle]
        scores[size] = _scored(model, SAID(size=size, structured=structured, seed=seed), score, on)
        low, high = (low, middle) if scores[size] >= share * full else (middle + 1, high)
    return IntrinsicDimension(sizes[low] if low < len(sizes) else None, share * full, dict(sorted(scores.items())))


def _scored(model: nn.Module, method: SAID, score: Callable[[Adapter], float], on: Any) -> float:
    adapter = adapt(model, method, on=on, name="intrinsic")
    try:
        found = float(score(adapter))
    finally:
        adapter.detach()
    if not math.isfinite(found):
        raise AttunementError(f"intrinsic_dimension: the score of {method.size} dimensions is {found}")
    return found
