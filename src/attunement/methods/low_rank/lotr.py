"""LoTR: the changes of all layers as one tensor of low rank, with a small core for each layer."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register
from attunement.methods._low_rank import too_large
from attunement.methods._sharing import kinds, lot, size, written
from attunement.site import Site


@register("low_rank/lotr", source="https://arxiv.org/abs/2402.01376")
class LoTR(WeightMethod):
    """Low tensor rank adaptation: W' = W + (scaling / rank) U G V, with U (out, rank) and V (rank, in) shared.

    The changes of a stack of matrices are a Tucker-2 decomposition: U and V, which are trained, belong to all matrices of
    one size, whatever their role, and G (rank, rank) to each.

    Args:
        rank: 8, for which the paper gives no one value; its code shows 2 on RoBERTa.
        scaling: 1, as in its code, which calls it scale.
        dropout: on x before V, in training only.

    Start: U and V normal(0, 1), G zero. The starts from the weights themselves, which the code has too, are left out.
    """

    placement: ClassVar[str] = "attention.{query,value}"

    rank: PositiveInt = 8
    scaling: PositiveFloat = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def shared(self, sites: list[Site]) -> Tensors:
        made: dict[str, Tensor] = {}
        for kind, (site, *_) in enumerate(kinds(sites, size)):
            made |= {f"U{kind}": torch.randn(site.outputs, self.rank), f"V{kind}": torch.randn(self.rank, site.inputs)}
        return made

    def tensors(self, site: Site) -> Tensors:
        return {"G": torch.zeros(self.rank, self.rank), "kind": written(lot(site, size).kind)}  # (rank, rank)

    def refuse(self, site: Site) -> str | None:
        return too_large(self.rank, site)

    def factors(self, _: Tensor, G: Tensor, kind: Tensor, **shared: Tensor) -> tuple[Tensor, ...]:
        U, V = shared[f"U{kind.shape[1]}"], shared[f"V{kind.shape[1]}"]
        return U, G * (self.scaling / self.rank), V  # (out, rank), (rank, rank), (rank, in)
