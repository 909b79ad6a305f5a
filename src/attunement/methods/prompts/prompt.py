"""Prompt tuning: trained embeddings before the text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attunement.errors import AttunementError
from attunement.fields import Tokens
from attunement.method import SequenceMethod, Tensors, register
from attunement.site import Site


def first_backbones(place: Any) -> bool:
    """Every backbone but a decoder that reads an encoder."""
    return bool(place.role == "backbone" and place.stack != "decoder")


@register("prompts/prompt", source="https://arxiv.org/abs/2104.08691")
class Prompt(SequenceMethod):
    """Soft prompt: [P; E(x)] in place of E(x), P (count, width) trained; nothing else of the model changes.

    Args:
        count: tokens; 20 as most libraries have, 100 in the source's experiments with T5.
        ids: words of the vocabulary to start from, repeated or cut to `count`; `from_text` makes them from a text.
        std: of the normal start where there are no ids. The source's code starts uniform in [0, 0.5) or from common
            words; a normal start of 1, as `nn.Embedding` and PEFT have, is far larger than the embeddings of most models.

    Acts before the encoder in an encoder-decoder, whose decoder attends to the prompt too. Start: not the base's function.
    """

    placement: ClassVar[Any] = staticmethod(first_backbones)
    cannot: ClassVar[dict[str, str]] = {
        "identity": "tokens in a sequence are attended to from the start",
        "merge": "its tokens stand in the sequence, not in a weight",
        "combine": "tokens in a sequence have no weight: they are there or not",
    }

    count: Tokens = 20
    ids: tuple[int, ...] = ()
    std: float = 0.02

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, count: int | None = None) -> Prompt:
        """A prompt that starts as the words of a text, as many as it has unless `count` says otherwise."""
        if not callable(tokenizer):
            raise AttunementError(f"Prompt.from_text: expected a tokenizer, got {tokenizer!r}; AutoTokenizer makes one")
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return cls(count=count or len(ids), ids=ids)

    def tensors(self, site: Site) -> Tensors:
        if not self.ids:
            return {"P": torch.randn(self.count, site.inputs) * self.std}  # (count, width)
        rows = torch.tensor(self.ids).repeat(self.count // len(self.ids) + 1)[: self.count]
        return {"P": site.weight[rows.to(site.weight.device)].clone()}

    def refuse(self, site: Any) -> str | None:
        if self.ids and site.embedding is None:
            return "it has no embeddings of words to start from"
        if self.ids and max(self.ids) >= (known := site.weight.shape[0]):
            return f"id {max(self.ids)} is outside its {known} words"
        return None

    def tokens(self, P: Tensor) -> Tensor:
        return P  # (count, width)
