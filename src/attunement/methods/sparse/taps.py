"""TAPS: every layer has a change of its own, and a gate that learns whether it is used."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.method import Method, Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._phases import others_go_on
from attunement.part import Part
from attunement.site import Site


@register("sparse/taps", source="https://arxiv.org/abs/2203.16708", placement="attention.*|mlp.*|conv")
class TAPS(WeightMethod):
    """Task-adaptive parameter sharing: W' = W + [score >= threshold] change, with change (out, in) and score (1,).

    Backward the gate is the identity: the score has the gradient of a factor. The loss gets sparsity times the mean |score|
    of all layers, so that layers whose change does not pay fall back to the base. `adapter.succeed()`, which `at.Trainer`
    calls at the end, leaves the layers that are used; only their changes are saved then.

    Args:
        sparsity: lambda. 1, the reference code's default; its scripts take 0.1 to 1.
        threshold, score: 0.1 and the first score, 0.15, as in the reference code.
        done: whether the gates are fixed; set by `succeed`.

    Start: change zero. The placement is what the reference code does to a ViT and, by `conv`, to a ResNet.
    The reference code (unofficial, by the first author) leaves the penalty out for two epochs and gives each task batch norm
    statistics of its own; neither is done here. Its joint variant, for several tasks at once, is left out.
    """

    cannot: ClassVar[dict[str, str]] = {"gradcheck": "the gradient of its gate is not that of a step"}

    sparsity: NonNegativeFloat = 1.0
    threshold: float = 0.1
    score: float = 0.15
    done: bool = False

    def tensors(self, site: Site) -> Tensors:
        change = torch.zeros(site.outputs, site.inputs)  # (out, in)
        return {"change": fixed(change)} if self.done else {"score": torch.tensor([self.score]), "change": change}

    def shared(self, sites: list[Site]) -> Tensors:
        return {} if self.done else {"mean": seeded(torch.tensor(self.sparsity / len(sites)))}  # ()

    def delta(self, _: Tensor, change: Tensor, score: Tensor | None = None) -> Tensor:
        if score is None:
            return change
        return ((score >= self.threshold).to(score) + (score - score.detach())) * change

    def penalty(self, score: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
        return torch.zeros(()) if score is None or mean is None else mean * score.abs().sum()

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, tuple[Method, Tensors]] | None:
        if self.done:
            return None
        used = [part for part in parts if (part.tensor("score") >= self.threshold).any()]
        if not used:
            raise AttunementError(f"succeed: no gate of {adapter.name!r} is open; take a smaller sparsity")
        method = dataclasses.replace(self, done=True)
        gates = {part: (part.tensor("score") >= self.threshold).to(part.tensor("change")) for part in used}
        changes = {part: gate.unsqueeze(-1) * part.tensor("change") for part, gate in gates.items()}
        return others_go_on(adapter, parts) | {p.site: (method, {"change": fixed(D)}) for p, D in changes.items()}
