"""IncreLoRA: ranks that grow during training at the matrices that matter most."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from typing_extensions import Self

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, register, running, seeded
from attunement.methods._schedule import agreed, average, orthogonality, span
from attunement.part import Part
from attunement.site import Site, put, whole

Decay = Annotated[float, Field(gt=0, lt=1)]
ADVANCE = 1e-5  # the value of a direction in reserve


@register(
    "low_rank/increlora",
    source="https://arxiv.org/abs/2308.12043",
    placement="attention.{query,key,value,output}|mlp.{up,down}",
)
class IncreLoRA(WeightMethod):
    """Incremental parameter allocation: W' = W + D, D = s B diag(live * E + spare) A, s = alpha / (number of live ranks).

    Every matrix begins with initial_rank live ranks and a few in reserve, whose E rests at 1e-5 while their A and B
    already learn. At every round the `top` matrices of the highest importance turn their reserve live and get another,
    until the mean is `rank`; then what is in reserve goes. The importance of a matrix is the running mean of
    sum |D * dL/dD| / sqrt(out * in) times the running mean of its deviation.

    Args:
        rank, initial_rank: the mean number of live ranks at the end and at the start. 2 and 1 in the authors' scripts.
        max_rank: the most that one matrix may get; None is 4 * rank. All of it is allocated from the start, so that the
            optimizer has every parameter, and the reserve besides. A small matrix has fewer.
        alpha: numerator of the scale; None is `rank`. 16 or 32 in the scripts.
        dropout: on x before A, in training only.
        grow: ranks that a matrix gets at a time, and the size of its reserve; None is rank / 2, as in the code.
        top: how many matrices grow in a round. 2 to 12 in the scripts, of 72.
        warmup, final: the steps before the first and after the last round, or shares of all steps below 1: 100 to 1000
            steps of warmup in the scripts, whose growth ends when the budget is spent.
        interval: steps between rounds; None spreads them evenly between warmup and final. 100 to 1000 in the scripts.
        orthogonality: weight of the mean of ||A A^T - I|| and ||B^T B - I|| over live and reserve in the loss.
        beta1, beta2: decay of the two running means.
        total_steps: None is the adapter's own, which `at.Trainer` sets.

    Start: A and B normal(0, 0.02), E zero. The reserve takes part from the first step on: at the start D is zero.
    The authors' code makes new parameters as it grows, each with a learning rate that warms up again ("restart
    warm-up"); here all follow the one schedule of the run. Rounds never overshoot the budget, there they may.
    D is formed as a matrix, as there: its importance needs the gradient of every entry.
    """

    rank: Rank = 2
    initial_rank: PositiveInt = 1
    max_rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0
    grow: PositiveInt | None = None
    top: PositiveInt = 4
    warmup: NonNegativeFloat = 0.1
    final: NonNegativeFloat = 0.5
    interval: PositiveInt | None = None
    orthogonality: NonNegativeFloat = 0.1
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    total_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.rank <= self.initial_rank:
            raise ValueError(f"rank {self.rank} leaves nothing to grow from an initial_rank of {self.initial_rank}")
        if self.max_rank is not None and self.max_rank < self.rank:
            raise ValueError(
                f"max_rank {self.max_rank} has no room for a mean of {self.rank}; the least is {self.rank}"
            )
        return self

    @property
    def reserve(self) -> int:
        """How many ranks a matrix has in reserve."""
        return self.grow or max(1, self.rank // 2)

    def _most(self, site: Site) -> int:
        return min(self.max_rank or 4 * self.rank, site.outputs, site.inputs)

    def shared(self, sites: list[Site]) -> Tensors:
        matrices = sum(math.prod(site.batch) for site in sites)
        return {"penalty_weight": seeded(torch.tensor(self.orthogonality / (2 * matrices)))}  # ()

    def tensors(self, site: Site) -> Tensors:
        r = self._most(site) + self.reserve
        return {
            "A": 0.02 * torch.randn(r, site.inputs),  # (r, in)
            "B": 0.02 * torch.randn(site.outputs, r),  # (out, r)
            "E": torch.zeros(r),  # (r,)
            "live": fixed((torch.arange(r) < self.initial_rank).float()),  # (r,)
            "spare": fixed(torch.zeros(r)),  # (r,)
            "seen": running(torch.zeros(())),  # ()
            "mean": running(torch.zeros(())),  # ()
            "spread": running(torch.zeros(())),  # ()
        }

    def delta(self, _: Tensor, A: Tensor, B: Tensor, E: Tensor, live: Tensor, spare: Tensor, seen: Tensor) -> Tensor:
        scale = (self.rank if self.alpha is None else self.alpha) / live.sum()
        D: Tensor = (B * (scale * (live * E + spare))) @ A  # (out, in)
        return _Sensed.apply(D, seen) if D.requires_grad else D  # type: ignore[no-untyped-call,no-any-return]

    def penalty(self, A: Tensor, B: Tensor, live: Tensor, spare: Tensor, penalty_weight: Tensor) -> Tensor:
        return penalty_weight * orthogonality(torch.sign(live + spare), A, B.mT)

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        begin, end = span("IncreLoRA", adapter, self.total_steps, self.warmup, self.final)
        matrices = [(part, i) for part in parts for i in range(part.tensor("seen").numel())]
        rounds = math.ceil((self.rank - self.initial_rank) * len(matrices) / (self.top * self.reserve))
        interval = self.interval or (end - begin) // rounds
        if interval * rounds > end - begin or not interval:
            raise AttunementError(
                f"IncreLoRA: {rounds} rounds {max(1, interval)} steps apart do not fit between step {begin} and step "
                f"{end}; give a larger top or grow, or a smaller interval, warmup or final"
            )
        missing = self.rank * len(matrices) - int(_together(parts, "live").sum())
        if missing <= 0:
            return
        seen = agreed(_together(parts, "seen")).split([part.tensor("seen").numel() for part in parts])
        for part, now in zip(parts, seen, strict=True):
            mean, spread = part.tensor("mean"), part.tensor("spread")
            average(now.view_as(mean).to(mean), mean, spread, self.beta1, self.beta2)
            part.tensor("seen").zero_()
        due = adapter.step > begin and (adapter.step - begin) % interval == 0
        if due:
            scores = (_together(parts, "mean") * _together(parts, "spread")).tolist()
            growing = [n for n, (part, i) in enumerate(matrices) if _live(part, i) < self._most(part.site)]
            for n in sorted(growing, key=lambda n: -scores[n])[: self.top]:
                missing -= self._grow(*matrices[n], missing)
        for part, i in matrices if due or not adapter.step else ():
            spare, here = _row(part.tensor("spare"), i), _live(part, i)
            spare.zero_()
            if missing > 0:
                spare[here : here + self.reserve] = ADVANCE

    def _grow(self, part: Part, i: int, most: int) -> int:
        """Turn the reserve of a matrix live, or as much of it as there is budget and room for."""
        here = _live(part, i)
        new = slice(here, here + min(self.reserve, most, self._most(part.site) - here))
        _row(part.tensor("live"), i)[new] = 1
        E = whole(part.tensor("E")).clone()
        _row(E, i)[new] = ADVANCE
        put(part.tensor("E"), E)
        return new.stop - new.start


def _together(parts: Sequence[Part], name: str) -> Tensor:
    """A tensor of all parts, one after the other."""
    near = parts[0].tensor(name)
    return torch.cat([part.tensor(name).flatten().to(near) for part in parts])


def _row(tensor: Tensor, i: int) -> Tensor:
    """Of (..., r), what belongs to the i-th matrix of a part: (r,), a view."""
    return tensor.view(-1, tensor.shape[-1])[i]


def _live(part: Part, i: int) -> int:
    return int(_row(part.tensor("live"), i).sum())


class _Sensed(torch.autograd.Function):
    """Matrices D (..., out, in), unchanged; the backward adds sum |D * dL/dD| / sqrt(out * in) to `seen` (...)."""

    @staticmethod
    def forward(D: Tensor, seen: Tensor) -> Tensor:
        return D.view_as(D)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        D, seen = ctx.saved_tensors
        size = math.sqrt(D.shape[-2] * D.shape[-1])
        seen.data.add_((D * gradients[0]).abs().sum((-2, -1)) / size)  # not a change for autograd to know of
        return gradients[0], None

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int, int], D: Tensor, seen: Tensor) -> tuple[Tensor, int]:
        return _Sensed.apply(D.movedim(in_dims[0], 0), seen), 0  # type: ignore[no-untyped-call]
