"""ASLoRA: one A for all layers, and B that layers come to share while they train."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, kaiming, register
from attunement.methods._low_rank import scale
from attunement.methods._schedule import span
from attunement.methods._sharing import copies, kinds, lot, nth, role, written
from attunement.part import Part
from attunement.site import Site, put, whole


@register("low_rank/as_lora", source="https://arxiv.org/abs/2412.10135", placement="attention.{query,value}")
class ASLoRA(WeightMethod):
    """Adaptive sharing LoRA: W' = W + (alpha / rank) B A, one A (rank, in) for all layers, B (out, rank) tied bit by bit.

    The matrices of a role, queries say, have a bank of as many B as there are layers, and each matrix the number of its
    own. While training, those two B of the bank that are most alike become their mean, and their matrices share it, until
    `left` are in use.

    Args:
        rank, alpha, dropout: as in `LoRA`.
        left: how many B a role has at the end; 4.
        warmup, final: steps before the first and after the last merge, or shares of all steps below 1; 0.1 and 0.5.
        total_steps: those of the training, where nobody sets them on the adapter.

    Start: A uniform in ±1/sqrt(in), B zero. Alike is a large cosine; merges are spread evenly. That A is shared and B merged
    during training is the paper's; its text could not be read, so measure, schedule and defaults are not verified. A B that
    nobody uses any more stays in the bank as zeros.
    """

    rank: Rank = 8
    left: PositiveInt = 4
    warmup: NonNegativeFloat = 0.1
    final: NonNegativeFloat = 0.5
    total_steps: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0

    def shared(self, sites: list[Site]) -> Tensors:
        made: dict[str, Tensor] = {}
        for kind, alike in enumerate(kinds(sites, role)):
            made[f"A{kind}"] = kaiming(self.rank, alike[0].inputs)
            made[f"B{kind}"] = torch.zeros(sum(map(copies, alike)), alike[0].outputs, self.rank)  # (layers, out, rank)
        return made

    def tensors(self, site: Site) -> Tensors:
        place = lot(site, role)
        return {
            "uses": fixed(torch.tensor([place.before + nth(site)])),  # (1,): which B of the bank
            "kind": written(place.kind),
            "scale": fixed(scale(self.rank, self.alpha, False)),  # ()
        }

    def factors(self, _: Tensor, uses: Tensor, kind: Tensor, scale: Tensor, **shared: Tensor) -> tuple[Tensor, ...]:
        bank = shared[f"B{kind.shape[1]}"]
        return bank.index_select(0, uses)[0], scale, shared[f"A{kind.shape[1]}"]  # (out, rank), (), (rank, in)

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        first, last = span("ASLoRA", adapter, self.total_steps, self.warmup, self.final)
        if adapter.step < first:
            return
        gone = min(1.0, (adapter.step + 1 - first) / max(1, last - first))
        for kind in sorted({part.tensor("kind").shape[1] for part in parts}):
            users = [part for part in parts if part.tensor("kind").shape[1] == kind]
            own = users[0].tensor(f"B{kind}")
            bank = whole(own).clone()
            kept = max(min(self.left, len(bank)), round(len(bank) - gone * (len(bank) - self.left)))
            while len(used := torch.cat([part.tensor("uses").flatten() for part in users]).unique()) > kept:
                merge(bank, used, users)
            put(own, bank)


def merge(bank: Tensor, used: Tensor, users: Sequence[Part]) -> None:
    """Make the two most alike of the used B of a bank their mean, in the place of the first; in place."""
    flat = torch.nn.functional.normalize(bank[used].flatten(1), dim=1)
    alike = (flat @ flat.mT).triu(1) + torch.ones_like(flat @ flat.mT).tril() * -2
    one, other = (int(used[i]) for i in divmod(int(alike.argmax()), len(used)))
    bank[one], bank[other] = (bank[one] + bank[other]) / 2, 0
    for part in users:
        uses = part.tensor("uses")
        uses[uses == other] = one
