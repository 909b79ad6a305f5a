"""GradNormLoRP: GaLore on the directions of a matrix's rows, with their lengths trained beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from attunement.optim.galore import GaLore, Sides


class GradNormLoRP(GaLore):
    """Gradient weight-normalised low-rank projection (https://arxiv.org/abs/2412.19616) around an optimiser.

    A matrix is W = g v / |v|, row by row, with lengths g (out, 1) and v (out, in). The gradient of v is projected and its step
    lifted as in `GaLore`; that of g is as it is. Both have weight decay.

        optimizer = GradNormLoRP(model.parameters(), torch.optim.AdamW, lr=0.01)

    Args:
        params, optimizer, rank, update_proj_gap, scale, proj_type: as in `GaLore`. 250 and 0.25 are those of the authors'
            example for training from the start, with rank 128; 500 and 4 for fine-tuning, with rank 4.
        published: as LowRankWeightNormAdamW of the authors' code is written: at the start of a step it sets W to v and g to
            |v|, so that what g has learned lasts one step, and the gradient of v is that of W, without the part along v
            taken out. False is weight normalisation as the formula says, whose gradient is that of the function.
            https://github.com/Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-Training

    v is not kept: it is W |v| / g, of which |v| is. A row of zeros stays one. The authors also train LoRA or DoRA by it:
    `GradNormLoRP(adapter.groups(lr))`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 250,
        scale: float = 0.25,
        proj_type: Sides = "std",
        published: bool = False,
        **options: Any,
    ) -> None:
        self.published = published
        own = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, optimizer, **own, **options)  # type: ignore[arg-type]

    def _stand_ins(self, p: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
        return [*super()._stand_ins(p, group), nn.Parameter(p.new_zeros(p.shape[0], 1))]

    def _give(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        if "length" not in state:
            state["length"] = state["size"] = torch.linalg.vector_norm(p, dim=1, keepdim=True)  # g and |v|, (out, 1)
        g, size = state["length"], state["size"]
        unit = torch.nan_to_num(p / g)  # v / |v|
        along = (grad * unit).sum(1, keepdim=True)
        if self.published:
            p.copy_(unit * size)
            state["length"] = size
            self._stands[p][0].grad = self._projected(p, grad, group)
        else:
            self._stands[p][0].grad = self._projected(p, torch.nan_to_num(g / size) * (grad - along * unit), group)
        self._stands[p][1].grad = along

    def _move(self, p: Tensor, group: Mapping[str, Any]) -> None:
        state, kept = self.state[p], 1 - group["lr"] * group.get("weight_decay", 0.0)
        v = torch.nan_to_num(p * (state["size"] / state["length"]))
        v = (v + group["scale"] * self._lifted(p)) * kept
        state["length"] = (state["length"] + self._stands[p][1]) * kept
        state["size"] = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        p.copy_(torch.nan_to_num(v * (state["length"] / state["size"])))
