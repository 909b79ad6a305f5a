"""Ladder side tuning: a narrow copy of the stack beside it, fed by every block, and no backward pass through the stack."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from attunement.method import NetworkMethod, Tensors, register


@register("side/lst", source="https://arxiv.org/abs/2206.06522", placement="backbone")
class LST(NetworkMethod):
    """s_0 = D_0 h_0,  s_{i+1} = block_i(g_i s_i + (1 - g_i) D_i h_{i+1}),  y' = U norm(s_L),  g_i = sigmoid(a_i / T).

    h_0 enters the stack and h_{i+1} leaves block i; nothing is kept for a backward pass through the frozen stack.
    D_i (width / reduction, width) and U (width, width / reduction) are linear with a bias; block_i is the stack's own
    kind of block, `reduction` times narrower.

    Args:
        reduction: 8 as in the source's scripts for T5 (4 for vision and language).
        temperature: T, 0.1 as in the source.
        layers: the blocks that have one beside them, all by default; at others s passes unchanged, as in the source,
            which leaves out a quarter of T5-base's.

    The norm is there where the stack ends in one. Start: a zero; the blocks take over the stack's largest weights (the
    source's structural pruning by magnitude; its default judges by Fisher information, which needs labels; and it chooses
    the features of the residual stream anew in each block, here they are the same in all). D and U start as the model's
    linear layers do. Not the base's function.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "what the side network gives takes the place of what the stack gives",
        "merge": "its network stands beside the weights",
    }

    reduction: PositiveInt = 8
    temperature: PositiveFloat = 0.1
    layers: tuple[int, ...] | None = None

    def kept(self, site: Any) -> list[int]:
        count = len(site.blocks)
        return list(range(count)) if self.layers is None else sorted({i % count for i in self.layers})

    def tensors(self, site: Any) -> Tensors:
        return {"a": torch.zeros(len(self.kept(site)))}  # (layers,)

    def build(self, site: Any) -> Mapping[str, nn.Module]:
        narrow, kept = site.inputs // self.reduction, self.kept(site)
        blocks = site.narrow(self.reduction)
        downs = nn.ModuleList(nn.Linear(site.inputs, narrow) for _ in range(len(kept) + 1))
        ends = {"norm": site.norm(self.reduction), "up": nn.Linear(narrow, site.inputs)}
        for layer in (*downs, ends["up"]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return {"blocks": nn.ModuleList(blocks[i] for i in kept), "downs": downs, **ends}

    def refuse(self, site: Any) -> str | None:
        count = len(site.blocks)
        outside = [i for i in self.layers or () if not -count <= i < count]
        return f"layer {outside[0]} is outside its {count} blocks" if outside else None

    def network(
        self,
        states: list[Tensor],
        runs: Any,
        y: Tensor,
        a: Tensor,
        blocks: Any,
        downs: Any,
        up: nn.Module,
        norm: nn.Module,
    ) -> Tensor:
        dtype = a.dtype
        gates = torch.sigmoid(a / self.temperature)  # (layers,)
        s = downs[0](states[0].to(dtype))  # (batch, tokens, width / reduction)
        kept = range(len(states) - 1) if self.layers is None else sorted({i % (len(states) - 1) for i in self.layers})
        for at, i in enumerate(kept):
            z = gates[at] * s + (1 - gates[at]) * downs[at + 1](states[i + 1].to(dtype))
            s = runs.again(i, blocks[at], z, self.reduction)
        return up(norm(s))  # type: ignore[no-any-return]
