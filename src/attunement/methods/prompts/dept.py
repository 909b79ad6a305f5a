"""DePT: a short soft prompt and a low-rank change of the embeddings at each position."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from attunement.fields import Tokens
from attunement.method import SequenceMethod, Tensors, fixed, kaiming, register
from attunement.methods.prompts.prompt import Prompt, first_backbones
from attunement.site import Site


@register("prompts/dept", source="https://arxiv.org/abs/2309.05173")
class DePT(SequenceMethod):
    """Decomposed prompt tuning: [P; E(x) + s A B], P (count, width), A (length, rank), B (rank, width), s = alpha / sqrt(rank).

    Row t of A B is added to the embedding of token t, the same for every text; pads are not counted, and tokens behind
    `length` stay as they are. The source pads every text to that length and leaves out the tokens that it generates.

    Args:
        count, rank: 40 and 45 cost what a prompt of 100 tokens costs at T5's width (768) and 256 positions.
        length: how many positions of the text are changed.
        alpha: 8 as in the source's code.
        low_rank_lr: learning rate of A and B over that of P. The source searches P's in 0.3 to 0.4 and theirs in
            5e-4 to 0.3; 1/60 is 5e-3 over 0.3.

    Start: P normal, B zero; A is uniform in +-1/sqrt(rank). Not the base's function.
    """

    placement: ClassVar[Any] = staticmethod(first_backbones)
    cannot: ClassVar[Mapping[str, str]] = Prompt.cannot

    count: Tokens = 40
    rank: PositiveInt = 45
    length: PositiveInt = 256
    alpha: PositiveFloat = 8.0
    low_rank_lr: PositiveFloat = 1 / 60
    std: float = 0.02

    def tensors(self, site: Site) -> Tensors:
        return {
            "P": torch.randn(self.count, site.inputs) * self.std,  # (count, width)
            "A": kaiming(self.length, self.rank),  # (length, rank)
            "B": torch.zeros(self.rank, site.inputs),  # (rank, width)
            "scale": fixed(torch.tensor(self.alpha / math.sqrt(self.rank))),
        }

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {name: {"lr": self.low_rank_lr} for name in ("A", "B")}

    def refuse(self, site: Any) -> str | None:
        return "its tokens have no embeddings of words to change" if site.embedding is None else None

    def tokens(self, P: Tensor) -> Tensor:
        return P  # (count, width)

    def embedded(self, x: Tensor, places: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        added = (scale * A @ B)[places.clamp(max=self.length - 1)]  # (batch or 1, tokens, width)
        return x + added * (places < self.length)[..., None]
