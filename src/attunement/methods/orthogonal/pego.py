"""PEGO: a group of LoRAs that are kept orthogonal to the weight and to each other."""

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, kaiming, register
from attunement.site import Site


@register("orthogonal/pego", source="https://arxiv.org/abs/2407.15085", placement="attention.{query,value}")
class PEGO(WeightMethod):
    """Parameter-efficient group: W' = W + sum_i D_i, D_i = B_i A_i, with B_i (out, rank) and A_i (rank, in).

    The loss gets `strictness` times sum_i |W D_i^T| + sum_(i < j) |D_i D_j^T|, the sums of absolute entries: what W does is
    preserved, and the group learns diverse things.

    Args:
        rank: 4.
        group: how many LoRAs; 4, 2 on the smallest of the authors' data sets.
        strictness: of both penalties; 1e-3. All as in the authors' scripts for a ViT-B/16 of CLIP.

    Start: A uniform in ±1/sqrt(in), B zero; no scale, as in the authors' code.
    """

    rank: Rank = 4
    group: PositiveInt = 4
    strictness: NonNegativeFloat = 1e-3

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.group, self.rank, site.inputs),  # (group, rank, in)
            "B": torch.zeros(self.group, site.outputs, self.rank),  # (group, out, rank)
        }

    def factors(self, _: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return B.transpose(0, 1).flatten(1), A.flatten(0, 1)  # (out, group * rank), (group * rank, in)

    def penalty(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        apart = ((W[..., None, :, :] @ A.mT) @ B.mT).abs().sum()  # of (..., group, out, out)
        first, second = torch.triu_indices(self.group, self.group, 1, device=A.device)
        met = A[..., first, :, :] @ A[..., second, :, :].mT  # (..., pairs, rank, rank)
        apart = apart + (B[..., first, :, :] @ met @ B[..., second, :, :].mT).abs().sum()
        return self.strictness * apart
