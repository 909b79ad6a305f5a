"""P-tuning: a soft prompt that a small network makes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from attunement.fields import Tokens
from attunement.method import SequenceMethod, Tensors, register
from attunement.methods.prompts.prompt import Prompt, first_backbones
from attunement.site import Site


@register("prompts/p_tuning", source="https://arxiv.org/abs/2103.10385")
class PTuning(SequenceMethod):
    """Prompt from an encoder: [encoder(P); E(x)], P (count, width) and the encoder trained.

    The encoder ties the tokens to one another while they are trained: an mlp of three layers (what PEFT has; the
    source's has two behind its LSTM), or the source's LSTM in both directions with a small mlp behind it.

    Args:
        count: tokens; 9 = 3 + 3 + 3 as in the source's template, where they stand between the words; here before them.
        encoder: "mlp" or "lstm".
        size: its hidden width, by default that of the embeddings.
        layers: of the LSTM.

    Start: P normal of 1, the encoder as its layers start. Not the base's function.
    """

    placement: ClassVar[Any] = staticmethod(first_backbones)
    count: Tokens = 9
    encoder: Literal["mlp", "lstm"] = "mlp"
    size: PositiveInt | None = None
    layers: PositiveInt = 2

    @property
    def cannot(self) -> Mapping[str, str]:  # type: ignore[override]
        return Prompt.cannot | ({"compile": "torch.compile takes no LSTM"} if self.encoder == "lstm" else {})

    def tensors(self, site: Site) -> Tensors:
        return {"P": torch.randn(self.count, site.inputs)}  # (count, width)

    def build(self, site: Site) -> dict[str, nn.Module]:
        d, size = site.inputs, self.size or site.inputs
        if self.encoder == "mlp":
            layers = (nn.Linear(d, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, d))
            return {"mlp": nn.Sequential(*layers)}
        lstm = nn.LSTM(d, size, self.layers, bidirectional=True, batch_first=True)
        return {"lstm": lstm, "mlp": nn.Sequential(nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, d))}

    def tokens(self, P: Tensor, mlp: nn.Module, lstm: nn.Module | None = None) -> Tensor:
        return mlp(P if lstm is None else lstm(P[None])[0][0])  # type: ignore[no-any-return]
