"""LLaMA-Adapter: a prompt in each layer with an attention of its own behind a gate that starts at zero."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from attunement.method import AttentionMethod, Tensors, register


@register("prompts/llama_adapter", source="https://arxiv.org/abs/2303.16199", placement="self_attention")
class LLaMAAdapter(AttentionMethod):
    """Zero-initialised attention: softmax(q K^T) V + g softmax(q K_p^T) V_p, K_p = W_k P and V_p = W_v P.

    P (count, width) and the gate g are trained in each layer; the model's own W_k and W_v make keys, which have no
    position, and values of P.

    Args:
        count: tokens in each layer, 10 as in the source.
        gate: one number for each "head", as in the source, or one for the "layer", as in PEFT.
        tanh: whether it is tanh(g) that multiplies, as the source trains since April 2023; PEFT has g itself.

    The source adapts the last 30 of 32 layers: `on="blocks[2:].self_attention"`. Start: g zero, P normal of 1.
    """

    cannot: ClassVar[Mapping[str, str]] = {"merge": "its attention depends on no weight alone"}

    count: PositiveInt = 10
    gate: Literal["head", "layer"] = "head"
    tanh: bool = True

    def tensors(self, site: Any) -> Tensors:
        gates = site.heads if self.gate == "head" else 1
        return {"P": torch.randn(self.count, site.inputs), "g": torch.zeros(gates)}  # (count, width), (heads,) or (1,)

    def attend(
        self,
        call: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        project: Callable[[str, Tensor], Tensor],
        P: Tensor,
        g: Tensor,
    ) -> Tensor:
        batch = q.shape[0]
        keys, values = (project(word, P).expand(batch, -1, -1, -1) for word in ("key", "value"))
        gate = (g.tanh() if self.tanh else g)[:, None]  # (heads or 1, 1)
        return call(q, k, v) + gate * call(q, keys, values, self.count)  # (batch, tokens, heads, head width)
