"""OLoRA: LoRA that starts from the QR decomposition of the weight."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._low_rank import moved, scale
from attunement.site import Site


@register("low_rank/olora", source="https://arxiv.org/abs/2406.01775", placement="attention.*|mlp.*")
class OLoRA(WeightMethod):
    """Orthonormal LoRA: W' = W + s (B A - B0 A0), s = alpha / rank, with B (out, rank), A (rank, in).

    B0 are the first `rank` columns of Q and A0 the first `rank` rows of R in W = Q R, where B and A start, so W' = W. That
    is an orthonormal basis of the first columns of W, and what W has in it.

    Args:
        rank: r, at most min(out, in); 8, PEFT's default.
        alpha: numerator of the scale; None is `rank`.
        rank_stabilised: scale alpha / sqrt(rank).

    The formula is that of PEFT, where the authors contributed it; their paper trains ranks 32 and 64. PEFT takes s B0 A0
    out of W; here B0 and A0 are computed again from the base at load, not stored, and W keeps its bits. The diagonal of R
    is made positive, PEFT takes the signs as they come: B0 A0 is the same.
    """

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False

    def tensors(self, site: Site) -> Tensors:
        W = site.weight  # (out, in)
        Q, R = torch.linalg.qr(W[:, : self.rank])  # the first columns of Q depend on no others
        B = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)  # (out, rank)
        A = B.mT @ W  # (rank, in)
        s = scale(self.rank, self.alpha, self.rank_stabilised)
        return {"A": A, "B": B, "A0": seeded(A.clone()), "B0": seeded(B.clone()), "scale": fixed(s)}

    def factors(self, _: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return moved(B, A, B0, A0, scale)  # (out, 2 rank), (), (2 rank, in)
