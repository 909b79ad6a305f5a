"""HRA: a weight turned by a few Householder reflections."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from attunement.method import Tensors, WeightMethod, kaiming, register
from attunement.site import Site


@register("orthogonal/hra", source="https://arxiv.org/abs/2405.17484", placement="attention.{query,value}")
class HRA(WeightMethod):
    """Householder reflection adaptation: W' = W H_1 H_2 ... H_r,  H_i = I - 2 u_i u_i^T, u_i of length one.

    The product of reflections is written as one change of rank r, I - U T^-1 U^T with U (in, r) and T upper triangular
    (the compact WY form), which spares the loop over reflections of the reference code.

    Args:
        rank: the number of reflections, at most `in`, and even so that they can start at no change. 8 in the reference code.
        regularisation: the paper's lambda, the weight of ||I - U^T U||^2 in the loss; between 0, free reflections, and
            large values, orthogonal ones. The public code has only the two ends (`apply_GS`).

    Start: u uniform in ±1/sqrt(in) with equal neighbours, whose reflections cancel (up to rounding).
    The reference code takes query and value for Llama, and every linear layer of a block for DeBERTa.
    """

    rank: Annotated[PositiveInt, Field(multiple_of=2)] = 8
    regularisation: NonNegativeFloat = 0.0

    def tensors(self, site: Site) -> Tensors:
        half = kaiming(site.inputs, self.rank // 2)  # (in, r/2)
        return {"u": half.repeat_interleave(2, dim=1)}  # (in, r)

    def refuse(self, site: Site) -> str | None:
        if self.rank > site.inputs:
            return f"rank {self.rank} is larger than its {site.inputs} inputs; the largest is {site.inputs // 2 * 2}"
        return None

    def factors(self, W: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        U = F.normalize(u, dim=0)  # (in, r)
        half = 0.5 * torch.eye(self.rank, dtype=u.dtype, device=u.device)
        T = torch.triu(U.T @ U, 1) + half  # (r, r)
        return -(W @ U), torch.linalg.solve_triangular(T, U.T, upper=True)  # (out, r), (r, in)

    def penalty(self, u: Tensor) -> Tensor:
        U = F.normalize(u, dim=0)
        return self.regularisation * (torch.eye(self.rank, dtype=u.dtype, device=u.device) - U.T @ U).square().sum()
