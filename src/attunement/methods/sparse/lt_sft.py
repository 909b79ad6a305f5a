"""LT-SFT: full fine-tuning finds the parameters that change most; then those alone are trained, from the start."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.fields import Share
from attunement.method import Method, ParameterMethod, Tensors, fixed, register
from attunement.methods._entries import bare, integer, scattered
from attunement.part import Part
from attunement.site import Site, whole


@register(
    "sparse/lt_sft", source="https://arxiv.org/abs/2110.07560", placement="embedding|attention.*|mlp.*|conv|pooler"
)
class LTSFT(ParameterMethod):
    """Lottery-ticket sparse fine-tuning: W' = W + change; then W' = W + values at `index`, zero elsewhere.

    The first phase trains every chosen parameter. Of all their entries together, the `count` whose |change| is largest
    are kept: one threshold for the model, ties included. Everything goes back to its start, a head too, and the second
    phase (`adapter.succeed`, which `at.Trainer` calls) trains those entries alone. What is saved then is sparse, and adds:
    `at.Sum("german", "ner")` is base + language + task, overlapping entries summed.

    Args:
        count: K. The reference scripts take 14,155,776 for tasks and 7,667,712 for languages, on multilingual BERT.
        share: K as a share of the chosen entries where `count` is None; 0.01, as in the reference code.
        full_l1, sparse_l1: weight of the mean |change| in the loss of either phase; 0, and 0.1 for both in the reference
            script for languages.
        kept: how many entries each parameter has in the second phase; set by `succeed`.

    Start: zero. The placement leaves norms as they are, as the reference scripts do.
    The reference code trains the parameters themselves under a masked gradient; weight decay pulls towards the base here,
    not towards zero, and reaches no entry that is not trained. Its mean |change| is over all parameters of the model,
    here over the chosen ones. It can repeat the phases with shares of K; its scripts do not, and here there is one round.
    """

    count: PositiveInt | None = None
    share: Share = 0.01
    full_l1: NonNegativeFloat = 0.0
    sparse_l1: NonNegativeFloat = 0.0
    kept: dict[str, PositiveInt] | None = None

    def tensors(self, site: Site) -> Tensors:
        if self.kept is None:
            return {"change": torch.zeros_like(site.weight)}  # the parameter's shape
        return bare(site, self.kept[site.key])  # values and index, (count,) each

    def shared(self, sites: list[Site]) -> Tensors:
        weight = self.full_l1 if self.kept is None else self.sparse_l1
        return {"l1": fixed(torch.tensor(weight / sum(site.weight.numel() for site in sites)))} if weight else {}

    def delta(
        self, _: Tensor, change: Tensor | None = None, values: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if change is not None:
            return change
        assert values is not None
        assert index is not None
        return scattered(values, index, _)

    def penalty(self, change: Tensor | None = None, values: Tensor | None = None, l1: Tensor | None = None) -> Tensor:
        moved = values if change is None else change
        assert moved is not None
        return moved.new_zeros(()) if l1 is None else l1 * moved.abs().sum()

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, Method | tuple[Method, Tensors]] | None:
        if self.kept is not None:
            return None
        sizes = {part: whole(part.tensor("change")).abs().flatten() for part in parts}
        total = sum(size.numel() for size in sizes.values())
        count = min(self.count or max(1, round(self.share * total)), total)
        device = next(iter(sizes.values())).device
        threshold = torch.cat([size.to(device) for size in sizes.values()]).topk(count, sorted=False).values.min()
        found = {
            part: ((size >= threshold.to(size.device)) & (size > 0)).nonzero()[:, 0] for part, size in sizes.items()
        }
        kept = {part.site.key: len(index) for part, index in found.items() if len(index)}
        if not kept:
            raise AttunementError(f"succeed: no parameter of {adapter.name!r} has changed yet; train its first phase")
        method = dataclasses.replace(self, kept=kept)
        return {
            part.site: (
                method,
                {
                    "values": sizes[part].new_zeros(len(index)),
                    "index": fixed(index.to(integer(part.site.weight.numel()))),
                },
            )
            for part, index in found.items()
            if len(index)
        }
