"""OSF: the large singular directions of a weight stay, the others learn beside them."""

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from attunement.ahead import ahead
from attunement.method import Tensors, WeightMethod, register, seeded
from attunement.part import Part
from attunement.site import Site
from attunement.subspace import decomposed


@register("orthogonal/osf", source="https://arxiv.org/abs/2504.07097", placement="attention.*|mlp.*")
class OSF(WeightMethod):
    """Orthogonal subspace fine-tuning: W' = W + U diag(S) Vh - U0 diag(S0) Vh0, trained U (out, m), S (m,), Vh (m, in).

    U0, S0 and Vh0 are the m smallest singular directions of W. The others, where earlier knowledge is, are kept: the
    gradient of U is projected off their columns, that of Vh off their rows.

    Args:
        frozen: how many of the largest directions are kept: a number, or a share of min(out, in). Half, as in PEFT. The
            paper chooses a share for each layer from how alike its inputs and outputs are; its code has a fixed one.

    Start: U, S and Vh are U0, S0 and Vh0, which are computed again from the base at load; another basis of the same
    directions gives the same W'. The change is a product of factors that are zero at the start, so W' is W exactly, in
    every precision. Weight decay draws U, S and Vh to zero, not to their start.
    Only gradients are projected, as in the authors' code: an optimiser that rescales entries, such as Adam, leaves the
    subspace again by a little. For a next task merge, and adapt again.
    """

    frozen: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.5

    @ahead()
    def tensors(self, site: Site) -> Tensors:
        k, rows = self.kept(site), torch.contiguous_format
        U, S, Vh = (M.contiguous() for M in decomposed(site.weight, k))
        return {
            "U": U[:, k:].clone(memory_format=rows),  # (out, m)
            "S": S[k:].clone(),  # (m,)
            "Vh": Vh[k:].clone(),  # (m, in)
            "U_base": seeded(U),  # (out, min), the kept columns first
            "S_base": seeded(S),  # (min,)
            "Vh_base": seeded(Vh),  # (min, in)
        }

    def kept(self, site: Site) -> int:
        """How many directions stay."""
        most = min(site.outputs, site.inputs)
        return int(most * self.frozen) if isinstance(self.frozen, float) else self.frozen

    def refuse(self, site: Site) -> str | None:
        most = min(site.outputs, site.inputs) - 1
        if self.kept(site) <= most:
            return None
        return (
            f"{self.frozen} kept directions leave none of a {site.outputs} x {site.inputs} matrix; the most are {most}"
        )

    def factors(
        self, _: Tensor, U: Tensor, S: Tensor, Vh: Tensor, U_base: Tensor, S_base: Tensor, Vh_base: Tensor
    ) -> tuple[Tensor, Tensor]:
        m = S.shape[-1]
        U0, S0, Vh0 = U_base[:, -m:], S_base[-m:], Vh_base[-m:]
        moved = (U - U0) * S + U0 * (S - S0)  # (out, m): U diag(S) - U0 diag(S0)
        return torch.cat((U * S, moved), dim=1), torch.cat((Vh - Vh0, Vh0))  # (out, 2 m), (2 m, in)

    def gradient(self, part: Part, name: str, g: Tensor) -> Tensor:
        if name == "U":
            kept = part.tensor("U_base")[..., : -g.shape[-1]]  # (..., out, k)
            return g - kept @ (kept.mT @ g)
        if name == "Vh":
            kept = part.tensor("Vh_base")[..., : -g.shape[-2], :]  # (..., k, in)
            return g - (g @ kept.mT) @ kept
        return g
