"""TriAdaptLoRA: triangular factors whose ranks grow where the change is largest."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.methods._schedule import agreed, span
from attunement.part import Part
from attunement.site import Site


@register("low_rank/triadaptlora", source="https://arxiv.org/abs/2501.08008", placement="attention.*|mlp.*")
class TriAdaptLoRA(WeightMethod):
    """Triangular adaptive LoRA: W' = W + s L diag(live) U, L (out, r) lower and U (r, in) upper triangular.

    A product of any two factors is one of two triangular ones: they have r (r - 1) numbers less. Every `interval` steps a
    matrix gets one live rank more if its importance ||L diag(live) U|| / sqrt(out * in), over the largest of all, reaches a
    threshold that rises from 0 to 1 between warmup and final: at first all grow, in the end the most important one.

    Args:
        rank: the mean number of live ranks at which growth ends.
        initial_rank: that at the start, 1.
        max_rank: the most that one matrix may get, allocated from the start; None is 2 * rank. A small matrix has fewer.
        alpha: s is alpha / rank; None is a scale of one.
        warmup, final: the steps before the first and after the last growth, or shares of all steps below 1.
        interval: steps between growths.
        total_steps: None is the adapter's own, which `at.Trainer` sets.

    Start: L zero, U uniform in ±1/sqrt(in), so a new rank changes nothing by itself. Both are kept as their entries.
    Only the abstract could be read, and no code is public: triangles, norms and thresholds that grow linearly with the
    steps are the paper's; the scales, the start and what ends growth are ours.
    """

    rank: Rank = 8
    initial_rank: PositiveInt = 1
    max_rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    warmup: NonNegativeFloat = 0.1
    final: NonNegativeFloat = 0.3
    interval: PositiveInt = 50
    dropout: Dropout = 0.0
    total_steps: PositiveInt | None = None

    def _most(self, site: Site) -> int:
        return min(self.max_rank or 2 * self.rank, site.outputs, site.inputs)

    def tensors(self, site: Site) -> Tensors:
        r, bound = self._most(site), site.inputs**-0.5
        less = r * (r - 1) // 2
        return {
            "L": torch.zeros(site.outputs * r - less),  # the entries on and below the diagonal of (out, r)
            "U": torch.empty(site.inputs * r - less).uniform_(-bound, bound),  # those of U^T, (in, r)
            "live": fixed((torch.arange(r) < self.initial_rank).float()),  # (r,)
            "s": fixed(torch.tensor(1.0 if self.alpha is None else self.alpha / self.rank)),  # ()
        }

    def factors(self, _W: Tensor, L: Tensor, U: Tensor, live: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        r = live.shape[-1]
        return _lower(L, _W.shape[-2], r), s * live, _lower(U, _W.shape[-1], r).mT  # (out, r), (r,), (r, in)

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        begin, end = span("TriAdaptLoRA", adapter, self.total_steps, self.warmup, self.final)
        if not begin < adapter.step <= end or (adapter.step - begin) % self.interval:
            return
        importance = agreed(torch.cat([self._importance(part).to(parts[0].tensor("L")) for part in parts]))
        counts = [part.tensor("live").view(-1, part.tensor("live").shape[-1]) for part in parts]  # (matrices, r)
        room = self.rank * len(importance) - int(sum(int(live.sum()) for live in counts))
        threshold = (adapter.step - begin) / (end - begin) * float(importance.max())
        rows = [row for live in counts for row in live]
        for i in importance.argsort(descending=True, stable=True).tolist():
            here = int(rows[i].sum())
            if room > 0 and here < len(rows[i]) and float(importance[i]) >= threshold:
                rows[i][here] = 1
                room -= 1

    def _importance(self, part: Part) -> Tensor:
        """Of each matrix of a part: (matrices,)."""
        site, live = part.site, part.tensor("live")
        L, U = (part.tensor(name) for name in ("L", "U"))
        each = zip(*(t.reshape(-1, t.shape[-1]) for t in (L, U, live)), strict=True)
        size = (site.outputs * site.inputs) ** 0.5
        norms = [
            torch.linalg.matrix_norm((_lower(low, site.outputs, len(m)) * m) @ _lower(up, site.inputs, len(m)).mT)
            / size
            for low, up, m in each
        ]
        return torch.stack(norms)


def _lower(entries: Tensor, rows: int, columns: int) -> Tensor:
    """The lower triangular matrix (rows, columns) of its entries, row by row."""
    row, column = torch.tril_indices(rows, columns, device=entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], rows * columns).index_copy(-1, row * columns + column, entries)
    return flat.unflatten(-1, (rows, columns))
