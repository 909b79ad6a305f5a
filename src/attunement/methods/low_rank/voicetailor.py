"""VoiceTailor: LoRA in the matrices that full fine-tuning changes most."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from attunement.fields import Share
from attunement.method import Method, register
from attunement.methods._changes import change_or_gradient
from attunement.methods.low_rank.lora import LoRA
from attunement.site import Site
from attunement.statistics import Statistics


@register("low_rank/voicetailor", source="https://arxiv.org/abs/2408.14739", placement="attention.*|mlp.*")
class VoiceTailor(LoRA):
    """Pivotal matrices: W' = W + (alpha / rank) B A where ||D|| / ||W|| is among the largest, D the change of full fine-tuning.

    Args:
        share: of the sites of the selection that get a LoRA, those of the largest ratios; one at least. A half.
        tuned: a safetensors file with the weights of the model after full fine-tuning, by their names in this one. None
            takes D from data, as the gradient of the loss: one step of full fine-tuning.
        rank, alpha, rank_stabilised, dropout, lora_plus: as in `LoRA`.

    The authors fine-tune a text-to-speech decoder in full once, find its attentions to change most, and adapt those by
    LoRA from then on. Their classifier-free guidance is sampling, and not here. No code of theirs was found: the ratio is
    the one they describe, Frobenius norms and the share are ours. What is saved are the LoRAs that were chosen.
    """

    cannot: ClassVar[Mapping[str, str]] = {"meta": "its places are chosen by the values of the weights"}

    share: Share = 0.5
    tuned: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("gradient",) if self.tuned is None else ()

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, Method]:
        changes = change_or_gradient(self.tuned, sites, statistics)
        ratios = {s: float(D.norm() / s.weight.norm().clamp_min(torch.finfo(D.dtype).tiny)) for s, D in changes.items()}
        chosen = sorted(sites, key=lambda site: -ratios[site])[: max(1, round(self.share * len(sites)))]
        lora = LoRA(self.rank, self.alpha, self.rank_stabilised, self.dropout, self.lora_plus)
        return dict.fromkeys(chosen, lora)
