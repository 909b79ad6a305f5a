"""KaSA: trained singular values, in place of the smallest ones of the weight."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from attunement.ahead import ahead
from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register, seeded
from attunement.methods._low_rank import scale
from attunement.site import Site
from attunement.subspace import smallest


@register("low_rank/kasa", source="https://arxiv.org/abs/2412.06071", placement="attention.{query,value}")
class KaSA(WeightMethod):
    """Knowledge-aware singular-value adaptation: W' = W - N + (alpha / rank) B diag(d) A, N the `rank` smallest triplets of W.

    What the smallest singular values hold is taken for noise. B (out, rank), d (rank,) and A (rank, in) are trained, and
    kept close to an SVD by a term of the loss: beta sum d^2 + gamma (||B^T B - I|| + ||A A^T - I||), Frobenius, a matrix.

    Args:
        rank: r, at most min(out, in), which leaves nothing of W; 8.
        alpha: numerator of the scale; 16.
        beta, gamma: 1e-4 and 1e-3, as in the authors' scripts for GLUE.

    Start: A uniform in ±1/sqrt(in), d normal(0, 1), B zero. So W' = W - N, not W: that is the method. N is computed again
    from the base at load, not stored. The penalty is PEFT's, a sum over matrices; the authors' code divides it by their
    number and has B B^T and A^T A in it, and leaves W whole where in >= out + rank, since it counts from `in`.
    No dropout: their scripts have none, and here it would bring N back.
    """

    cannot: ClassVar[Mapping[str, str]] = {"identity": "the smallest singular values of the weight are left out"}

    rank: Rank = 8
    alpha: PositiveFloat | None = 16.0
    beta: NonNegativeFloat = 1e-4
    gamma: NonNegativeFloat = 1e-3

    def tensors(self, site: Site) -> Tensors:
        left, right = self.left_out(site)
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "d": torch.randn(self.rank),  # (rank,)
            "left": seeded(left),  # (out, rank)
            "right": seeded(right),  # (rank, in)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    @ahead()
    def left_out(self, site: Site) -> tuple[Tensor, Tensor]:
        return smallest(site.weight, self.rank)

    def factors(
        self, _: Tensor, A: Tensor, B: Tensor, d: Tensor, left: Tensor, right: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([B * (scale * d), -left], dim=-1), torch.cat([A, right], dim=-2)  # (out, 2 rank), (2 rank, in)

    def penalty(self, A: Tensor, B: Tensor, d: Tensor) -> Tensor:
        eye = torch.eye(d.shape[-1], dtype=A.dtype, device=A.device)
        apart = torch.linalg.matrix_norm(B.mT @ B - eye) + torch.linalg.matrix_norm(A @ A.mT - eye)
        return (self.beta * d.square().sum(-1) + self.gamma * apart).sum()
