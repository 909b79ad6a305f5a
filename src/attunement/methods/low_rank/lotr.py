"""LoTR: the changes of all layers as one tensor of low rank, with a small core for each layer."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, register
from attunement.methods._sharing import kinds, lot, size, written
from attunement.site import Site


@register("low_rank/lotr", source="https://arxiv.org/abs/2402.01376", placement="attention.{query,value}")
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

    rank: Rank = 8
    scaling: PositiveFloat = 1.0
    dropout: Dropout = 0.0

    def shared(self, sites: list[Site]) -> Tensors:
        made: dict[str, Tensor] = {}
        for kind, (site, *_) in enumerate(kinds(sites, size)):
            made |= {f"U{kind}": torch.randn(site.outputs, self.rank), f"V{kind}": torch.randn(self.rank, site.inputs)}
        return made

    def tensors(self, site: Site) -> Tensors:
        return {"G": torch.zeros(self.rank, self.rank), "kind": written(lot(site, size).kind)}  # (rank, rank)

    def factors(self, _: Tensor, G: Tensor, kind: Tensor, **shared: Tensor) -> tuple[Tensor, ...]:
        U, V = shared[f"U{kind.shape[1]}"], shared[f"V{kind.shape[1]}"]
        return U, G * (self.scaling / self.rank), V  # (out, rank), (rank, rank), (rank, in)
