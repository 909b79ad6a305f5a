"""Visual prompt tuning: trained tokens among the patches of an image."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from attunement.method import SequenceMethod, Tensors, register


@register("prompts/vpt", source="https://arxiv.org/abs/2203.12119")
class VPT(SequenceMethod):
    """VPT-deep: each block reads [x; P_i] and what comes of P_i is dropped; VPT-shallow: one P through all blocks.

    P_i is (count, width). The source puts the tokens behind the class token; among tokens that carry their position
    with them, where they stand makes no difference.

    Args:
        count: tokens; 5 as in the source's code, which searched 1 to 200.
        deep: tokens of its own for every block (the default here, stronger in the source's tables), or once.
        dropout: of the tokens, 0 in the source's code.

    Acts on blocks, shallow on the backbone. Start: uniform in +-sqrt(6 / (fan_in + width)), fan_in of the patch
    embedding, as in the source. Not the base's function.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "tokens in a sequence are attended to from the start",
        "merge": "its tokens stand in the sequence, not in a weight",
        "combine": "tokens in a sequence have no weight: they are there or not",
    }

    count: PositiveInt = 5
    deep: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def placement(self) -> str:  # type: ignore[override]
        return "blocks" if self.deep else "backbone"

    def refuse(self, site: Any) -> str | None:
        return "it is a model of text; Prompt is the method for those" if site.embedding is not None else None

    def tensors(self, site: Any) -> Tensors:
        bound = math.sqrt(6 / (site.fan_in + site.inputs))
        return {"P": torch.empty(self.count, site.inputs).uniform_(-bound, bound)}

    def tokens(self, P: Tensor) -> Tensor:
        return P  # (count, width)
