"""R-AMT: binary masks over attention weights, learned without forgetting what the model does."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.method import Method, Tensors, WeightMethod, fixed, register
from attunement.methods._phases import others_go_on
from attunement.methods._schedule import agreed, drawn
from attunement.part import Part
from attunement.site import Site


@register("sparse/r_amt", source="https://arxiv.org/abs/2307.15049", placement="attention.*")
class RAMT(WeightMethod):
    """Regularised attention mask tuning: W' = W [score > boundary], elementwise, with score (out, in).

    Backward the mask is the identity. The loss gets norm times the Euclidean norm of each score. Before a step the gradient
    a of the loss meets b, that of the distance to the model without masks: with P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2,
    an entry of a is kept with probability P, which is one where both agree. The distance is `adapter.objective`, which
    `at.Trainer` has:

        def objective():  # on the batch of the step
            with torch.no_grad(), at.using(model, None):
                teacher = model(**batch).logits.softmax(-1)
            return -(teacher * model(**batch).logits.log_softmax(-1)).sum(-1).mean()

    `adapter.succeed()`, which `at.Trainer` calls at the end, leaves the masks, a bit an entry.

    Args:
        first, boundary: the first score, 1e-2, and the boundary, 5e-3, as in the reference code.
        norm: 1e-4, as there.
        dropout_share: lambda, how much of a gradient that is not kept goes away; 1. Without any no objective is asked for.
        seed: of the draws, which depend on it and on the step alone.
        done: whether the masks are fixed; set by `succeed`.

    Start: every mask is one. Published for CLIP, in both encoders: Adam at 8e-5, cosine, 30 epochs; weights of the mlp are
    not masked. The reference code draws b from the very batch of a, which is for the objective to do.
    """

    cannot: ClassVar[dict[str, str]] = {"gradcheck": "the gradient of its mask is not that of a step"}

    measures: ClassVar[str] = "departure"

    first: float = 1e-2
    boundary: float = 5e-3
    norm: NonNegativeFloat = 1e-4
    dropout_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: NonNegativeInt = 0
    done: bool = False

    def tensors(self, site: Site) -> Tensors:
        if self.done:
            return {"bits": fixed(_packed(torch.ones(site.outputs, site.inputs, dtype=torch.bool)))}
        return {"score": torch.full((site.outputs, site.inputs), self.first)}  # (out, in)

    def delta(self, W: Tensor, score: Tensor | None = None, bits: Tensor | None = None) -> Tensor:
        if score is not None:
            return ((score > self.boundary).to(score) - 1 + (score - score.detach())) * W
        assert bits is not None
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        mask = (bits[:, None].bitwise_right_shift(places) & 1).flatten()[: W.numel()]
        return (mask.to(W).view(W.shape) - 1) * W

    def penalty(self, score: Tensor | None = None) -> Tensor:
        return torch.zeros(()) if score is None else self.norm * torch.linalg.matrix_norm(score).sum()

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        scores = [part.holder._parameters["score"] for part in parts if "score" in part.holder._parameters]
        if not self.dropout_share or not scores:
            return
        if adapter.objective is None:
            raise AttunementError(
                f"RAMT: gradient dropout needs the distance to the model without masks: set objective of {adapter.name!r} "
                "to a function without arguments that returns it, or dropout_share=0"
            )
        with torch.enable_grad():
            others = torch.autograd.grad(adapter.objective(), scores)  # type: ignore[arg-type]
        for number, (score, b) in enumerate(zip(scores, others, strict=True)):
            a, b = score.grad, agreed(b)  # type: ignore[union-attr]
            if a is None:
                continue
            kept = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8)) / 2
            chance = torch.rand(a.shape, generator=drawn(self.seed, number, adapter.step)).to(a)
            a.mul_(1 - self.dropout_share * (kept <= chance))

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, tuple[Method, Tensors]] | None:
        if self.done:
            return None
        method = dataclasses.replace(self, done=True)
        masks = {part.site: _packed(part.tensor("score") > self.boundary) for part in parts}
        return others_go_on(adapter, parts) | {site: (method, {"bits": fixed(bits)}) for site, bits in masks.items()}


def _packed(mask: Tensor) -> Tensor:
    """The bits of matrices (..., out, in), eight a byte: (..., bytes), uint8."""
    flat = mask.flatten(-2).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(-1, dtype=torch.uint8)
