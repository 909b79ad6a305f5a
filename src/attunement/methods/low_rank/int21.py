"""INT2.1: a weight in few bits, and a low-rank correction of what that loses."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.methods._low_rank import scale
from attunement.site import Site
from attunement.subspace import singular


@register("low_rank/int21", source="https://arxiv.org/abs/2306.08162", placement="attention.*|mlp.*")
class INT21(WeightMethod):
    """Low-rank error correction: W' = Q(W) + (alpha / rank) B A, Q rounding to 2^bits values, B (out, rank), A (rank, in).

    Q spaces its values evenly between the smallest and the largest entry of each row, or of each `columns` of a row. B A
    is trained so that the model again gives what the base gives: a loss between both, `at.using(model, None)` being the
    base; and then for a task.

    Args:
        bits: 2. columns: of a row that share a grid, a divisor of `in`; None is the whole row.
        rank: 16. alpha: numerator of the scale; None is `rank`.

    Start: B A is the best of its rank for W - Q(W), by the SVD of that. The abstract alone could be read, no code is public:
    the grid, the start and the ranks are ours. Q(W) is computed from W, not packed: this shows and trains what a
    quantised model will give, it saves no memory. Over a base that bitsandbytes has packed the correction is `LoRA`.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "the weight is rounded to a few values, of which it corrects a part"
    }

    bits: Annotated[int, Field(ge=1, le=8)] = 2
    columns: PositiveInt | None = None
    rank: Rank = 16
    alpha: PositiveFloat | None = None

    def tensors(self, site: Site) -> Tensors:
        s = scale(self.rank, self.alpha, rank_stabilised=False)
        U, S, Vh = singular(-self.error(site.weight), self.rank)
        root = torch.sqrt(S / s.to(S))  # (rank,)
        return {"A": root[:, None] * Vh, "B": U * root, "scale": fixed(s)}  # (rank, in), (out, rank), ()

    def error(self, W: Tensor) -> Tensor:
        """Q(W) - W."""
        V = W.detach().float().unflatten(-1, (-1, self.columns or W.shape[-1]))  # (out, groups, columns)
        low, high = V.amin(-1, keepdim=True), V.amax(-1, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp_min(torch.finfo(V.dtype).tiny)
        return (V - low).div_(step).round_().mul_(step).add_(low).sub_(V).flatten(-2).to(W.dtype)

    def refuse(self, site: Site) -> str | None:
        size = self.columns or site.inputs
        if site.inputs % size:
            sizes = [d for d in range(1, site.inputs + 1) if site.inputs % d == 0]
            nearest = min(sizes, key=lambda d: abs(d - size))
            return f"groups of {size} columns do not fill its {site.inputs} inputs; the nearest size is {nearest}"
        return "its weight is quantised already; use LoRA" if site.layout.beside_only else None

    def delta(self, W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        return self.error(W) + scale * (B @ A)  # (out, in)
