"""Prefix tuning: trained keys and values before those of the text, in every layer."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from attunement.method import AttentionMethod, Tensors, register


@register("prompts/prefix", source="https://arxiv.org/abs/2101.00190", placement="self_attention")
class Prefix(AttentionMethod):
    """Prefix: softmax(q [K_p; K]^T) [V_p; V], with K_p, V_p (key heads, count, head width) trained in each layer.

    Args:
        count: keys and values in each layer; 10 as in the source's scripts for GPT-2.
        std: of the normal start. The source starts at 1 without its reparametrisation, PEFT too.
        offset_positions: whether the text begins at position `count`, as in the source and in PEFT, whose prefix is a
            cache; without it the text keeps the positions that the model knows.

    Prefix keys have no position and every query sees them; they never enter a cache. The source's reparametrisation by
    an mlp is left out: it steadies a large learning rate and is thrown away after training. Start: not the base's
    function.
    """

    cannot: ClassVar[dict[str, str]] = {
        "identity": "its keys are attended to from the start",
        "merge": "its keys and values depend on no weight",
    }

    count: PositiveInt = 10
    std: float = 0.02
    offset_positions: bool = False

    def shift(self) -> int:
        return self.count if self.offset_positions else 0

    def tensors(self, site: Any) -> Tensors:
        shape = (site.key_heads, self.count, site.width)
        return {"K": torch.randn(shape) * self.std, "V": torch.randn(shape) * self.std}

    def attend(
        self, call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, project: object, K: Tensor, V: Tensor
    ) -> Tensor:
        batch = k.shape[0]
        k = torch.cat((K.expand(batch, -1, -1, -1), k), dim=2)  # (batch, key heads, count + keys, head width)
        v = torch.cat((V.expand(batch, -1, -1, -1), v), dim=2)
        return call(q, k, v, self.count)
