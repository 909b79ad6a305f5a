"""UniPT: the states of a frozen stack, aggregated by how like the last one they are."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from attunement.method import NetworkMethod, register


@register("side/unipt", source="https://arxiv.org/abs/2308.14316", placement="backbone")
class UniPT(NetworkMethod):
    """y' = up(X_L + mix(sum_i c_i M_i)),  M_i = (S_i + I) X_i,  S_i = relu(X_L X_i^T), rows divided by their sums.

    X_i (batch, tokens, width / reduction) is the state h_i after a linear layer and a norm of its own, X_L that of the
    last; c (layers) is a softmax over a linear measure of the product of the mean tokens of X_L and X_i (without the source's
    bias, to which a softmax is blind). Tokens that
    nothing attends to (pads) have no part. `mix` is linear, relu, linear, norm; `up` linear.

    Args:
        reduction: 2 as in the source's scripts.

    Of the source's four variants this is the one for BERT's blocks. Its linear layers start normal of 0.02 with zero
    biases, as BERT's do. Not the base's function: what it gives takes the place of what the stack gives.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "what the network gives takes the place of what the stack gives",
        "merge": "its network stands beside the weights",
    }

    reduction: PositiveInt = 2

    def refuse(self, site: Any) -> str | None:
        rest = site.inputs % self.reduction
        return f"its width {site.inputs} is not divided by reduction={self.reduction}" if rest else None

    def build(self, site: Any) -> Mapping[str, nn.Module]:
        d, w = site.inputs, site.inputs // self.reduction
        modules = {
            "downs": nn.ModuleList(
                nn.Sequential(nn.Linear(d, w), nn.LayerNorm(w)) for _ in range(len(site.blocks) + 1)
            ),
            "gate": nn.Linear(w, 1, bias=False),
            "mix": nn.Sequential(nn.Linear(w, d), nn.ReLU(), nn.Linear(d, w), nn.LayerNorm(w)),
            "up": nn.Linear(w, d),
        }
        for module in modules.values():
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        return modules

    def network(
        self, states: list[Tensor], runs: Any, y: Tensor, downs: Any, gate: nn.Module, mix: nn.Module, up: Any
    ) -> Tensor:
        dtype = up.weight.dtype
        *below, last = (down(h.to(dtype)) for down, h in zip(downs, states, strict=True))  # (batch, tokens, w) each
        seen = runs.seen()
        seen = last.new_ones(last.shape[:2]) if seen is None else seen.to(dtype)  # (batch, tokens)
        share = (seen / seen.sum(1, keepdim=True).clamp(min=1))[..., None]  # (batch, tokens, 1)
        anchor = (last * share).sum(1)  # (batch, w)
        mixed, measures = [], []
        for X in below:
            S = F.relu(last @ X.mT * seen[:, None])  # (batch, tokens, tokens)
            mixed.append(S @ X / (S.sum(-1, keepdim=True) + 1e-6) + X)
            measures.append(gate(anchor * (X * share).sum(1)))  # (batch, 1)
        c = torch.softmax(torch.stack(measures), dim=0)[..., None]  # (layers, batch, 1, 1)
        return up(last + mix((c * torch.stack(mixed)).sum(0)))  # type: ignore[no-any-return]
