"""LoRA-GA: LoRA whose first step is the best that its rank can do towards the gradient of the whole weight."""

from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.errors import AttunementError
from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.methods._low_rank import moved, scale
from attunement.site import Site
from attunement.statistics import Statistics
from attunement.subspace import singular


@register("low_rank/lora_ga", source="https://arxiv.org/abs/2407.05000", placement="attention.*|mlp.*")
class LoRAGA(WeightMethod):
    """LoRA with gradient approximation: W' = W + s (B A - B0 A0), s = alpha / rank, with B (out, rank), A (rank, in).

    With the SVD of the gradient of the loss by W, G = U S V^T, A0 is the first `rank` rows of V^T and B0 the next `rank`
    columns of U, each times out^(1/4) / sqrt(gamma), where A and B start; so W' = W.

    Args:
        rank: r, at most min(out, in); above half of that B0 and A0 share directions. 8.
        alpha: numerator of the scale; 16.
        rank_stabilised: scale alpha / sqrt(rank), as in the paper's runs.
        gamma: 16, as in the authors' configuration; 64 in one of their runs.

    It needs data with labels, for a model that returns its loss: 8 batches of one row in the authors' configuration.
    That is their code with its defaults ("ArB2r", "stable"). PEFT's port multiplies B0 by its singular values too, and A0
    by nothing. B0 and A0 depend on data: they are saved, twice the size of LoRA's files. The authors take B0 A0 out of W.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    cannot: ClassVar[dict[str, str]] = {"meta": "it starts from data, which cannot run through a model without values"}

    rank: Rank = 8
    alpha: PositiveFloat | None = 16.0
    rank_stabilised: bool = False
    gamma: PositiveFloat = 16.0

    def tensors(self, site: Site) -> Tensors:
        return self._from(torch.zeros(site.outputs, self.rank), torch.zeros(self.rank, site.inputs))

    def calibrate(self, site: Site, statistics: Statistics) -> Tensors:
        G = statistics["gradient"]  # (out, in)
        if not torch.isfinite(G).all():
            raise AttunementError(f"adapt: the gradient of the loss at {site.key} is not finite")
        if not G.any():
            raise AttunementError(f"adapt: the gradient of the loss at {site.key} is zero, which says nothing about it")
        U, _, Vh = singular(G.to(site.weight), 2 * self.rank)
        size = site.outputs**0.25 / self.gamma**0.5
        return self._from(size * U[:, -self.rank :], size * Vh[: self.rank])

    def _from(self, B: Tensor, A: Tensor) -> Tensors:
        s = scale(self.rank, self.alpha, self.rank_stabilised)
        return {"A": A, "B": B, "A0": fixed(A.clone()), "B0": fixed(B.clone()), "scale": fixed(s)}

    def factors(self, _: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return moved(B, A, B0, A0, scale)  # (out, 2 rank), (), (2 rank, in)
