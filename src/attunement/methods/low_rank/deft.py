"""DEFT: what a weight does in a few directions of its outputs is taken out, and something learned put in."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("low_rank/deft", source="https://arxiv.org/abs/2509.22793", placement="attention.*|mlp.*")
class DEFT(WeightMethod):
    """Decompositional efficient fine-tuning: W' = W - Q S^T W + s Q R, with P (out, rank) and R (rank, in) trained.

    Args:
        rank: of P and R; 8.
        decomposition: Q = P and S = relu(P), or with "qr" Q = S, orthonormal directions that span P.
        alpha: s is alpha / rank; None is a scale of one.
        dropout: on x before the change, in training only.
        para: without R, W' = W - Q S^T W: PaRa (https://arxiv.org/abs/2406.05641), which does not start at W.

    Start: P normal(0, 0.02) and R = S^T W / s, so that W' = W. That is PEFT's; the authors' code draws R too, and so begins
    without these directions of W. Its gate on R is left out. The diagonal of the triangular factor of P is made positive:
    with signs as a decomposition gives them, Q R would jump where an entry of P passes zero.
    """

    rank: Rank = 8
    decomposition: Literal["relu", "qr"] = "relu"
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0
    para: bool = False

    @property
    def cannot(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"identity": "directions of the weight are taken out from the start"} if self.para else {}

    def tensors(self, site: Site) -> Tensors:
        W = site.weight  # (out, in)
        P = 0.02 * torch.randn(site.outputs, self.rank).to(W)  # (out, rank)
        return {"P": P} if self.para else {"P": P, "R": self._directions(P)[1].mT @ W / self._scale}

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _directions(self, P: Tensor) -> tuple[Tensor, Tensor]:
        if self.decomposition == "relu":
            return P, P.relu()
        Q, R = torch.linalg.qr(P)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)  # (out, rank)
        return Q, Q

    def factors(self, W: Tensor, P: Tensor, R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        Q, S = self._directions(P)  # (out, rank) each
        kept = S.mT @ W  # (rank, in)
        return Q, -kept if R is None else self._scale * R - kept
