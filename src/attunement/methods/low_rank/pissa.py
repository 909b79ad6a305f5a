"""PiSSA: LoRA that starts as the principal part of the weight, in place of that part."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.ahead import ahead
from attunement.fields import Rank
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._low_rank import moved, scale
from attunement.site import Site
from attunement.subspace import decomposed, first, singular


@register("low_rank/pissa", source="https://arxiv.org/abs/2404.02948", placement="attention.*|mlp.*")
class PiSSA(WeightMethod):
    """Principal singular values and vectors: W' = W + s (B A - B0 A0), s = alpha / rank, B (out, rank), A (rank, in).

    B0 = U sqrt(S / s) and A0 = sqrt(S / s) V^T are the `rank` largest singular triplets of W, where B and A start: what
    trains is the principal part of W, and W keeps its bits.

    Args:
        rank: r, at most min(out, in). The authors take 8 on GLUE and 128 for language models.
        alpha: numerator of the scale; None is `rank`, as in their scripts.
        rank_stabilised: scale alpha / sqrt(rank).
        exact: decompose the whole of W. Else a random projection with 4 power iterations finds the triplets where W is
            large beside the rank, the authors' "fast SVD": its error stays in W.

    The published code takes B0 A0 out of W itself. Here B0 and A0 are computed again from the base at load, not stored.
    In a saved file B and A are relative to them, as in PEFT; where the singular values at the cut coincide, or rounding of
    the base differs, B0 A0 is another. No dropout: the authors use none, and here it would drop what is left of W too.
    """

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    rank_stabilised: bool = False
    exact: bool = False

    @ahead()
    def tensors(self, site: Site) -> Tensors:
        s = scale(self.rank, self.alpha, self.rank_stabilised)
        B, A = self.start(site, float(s))
        return {"A": A, "B": B, "A0": seeded(A.clone()), "B0": seeded(B.clone()), "scale": fixed(s)}

    def start(self, site: Site, s: float) -> tuple[Tensor, Tensor]:
        """B0 (out, rank) and A0 (rank, in)."""
        W, r = site.weight, self.rank
        U, S, Vh = first(*decomposed(W, r), r) if self.exact else singular(W, r)
        root = torch.sqrt(S / s)  # (rank,)
        return U * root, root[:, None] * Vh

    def factors(self, _: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return moved(B, A, B0, A0, scale)  # (out, 2 rank), (), (2 rank, in)
