"""LoKr: a change that is the Kronecker product of a small matrix and one of low rank."""

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from attunement.method import Tagged, Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.site import Site


def divisors(size: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is `size`: the first is `factor` where that divides it, else the largest divisor up to
    it and to the square root."""
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    first = next(number for number in range(most, 0, -1) if size % number == 0)
    return first, size // first


@register("low_rank/lokr", source="https://arxiv.org/abs/2309.14859", placement="attention.*|mlp.*")
class LoKr(WeightMethod):
    """Low-rank Kronecker product (LyCORIS): W' = W + (alpha / rank) C ⊗ D, C (l, m), D (k, n), l k = out, m n = in.

    D is DB (k, rank) DA (rank, n), unless the rank is half of its larger size or more.

    Args:
        rank, alpha: as in `LoRA`; 8 and the rank, as in PEFT.
        factor: l and m where it divides out and in, else the largest divisor up to it; None is near the square root.
        both: C too is a product, CB (l, rank) CA (rank, m), where the rank is small enough.

    Start: C (or CB) zero, the others uniform in ±1/sqrt(last size), as in PEFT; LyCORIS has D (or DA) zero, and a scale of
    1 where neither is a product, where PEFT keeps alpha / rank. Factors for each kernel position of a convolution, and
    dropouts of ranks and modules, are left out.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    factor: PositiveInt | None = None
    both: bool = False

    def tensors(self, site: Site) -> Tensors:
        (m, n), (l, k) = divisors(site.inputs, self.factor), divisors(site.outputs, self.factor)  # noqa: E741
        r = self.rank
        made: dict[str, Tensor | Tagged] = {"scale": fixed(scale(r, self.alpha, False))}
        if self.both and 2 * r < max(l, m):
            made |= {"CB": torch.zeros(l, r), "CA": kaiming(r, m)}
        else:
            made |= {"C": torch.zeros(l, m)}
        if 2 * r < max(k, n):
            return made | {"DB": kaiming(k, r), "DA": kaiming(r, n)}
        return made | {"D": kaiming(k, n)}

    def delta(
        self,
        _W: Tensor,
        scale: Tensor,
        C: Tensor | None = None,
        CB: Tensor | None = None,
        CA: Tensor | None = None,
        D: Tensor | None = None,
        DB: Tensor | None = None,
        DA: Tensor | None = None,
    ) -> Tensor:
        C = CB @ CA if C is None else C  # type: ignore[operator]  # (l, m)
        D = DB @ DA if D is None else D  # type: ignore[operator]  # (k, n)
        return (scale * C[:, None, :, None] * D[None, :, None, :]).reshape(_W.shape)  # (l, k, m, n) as (out, in)
