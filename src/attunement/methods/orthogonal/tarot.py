"""TaRot: attention heads turned by a few angles that are searched for, without gradients, on a handful of examples."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.method import Tensors, WeightMethod, register, running
from attunement.methods._schedule import agreed, drawn
from attunement.part import Part
from attunement.site import Site


@register("orthogonal/tarot", source="https://arxiv.org/abs/2410.04277", placement="blocks[:16].attention.output")
class TaRot(WeightMethod):
    """Task-aware rotation of heads: W' = W R^T, R turning neighbouring inputs 2i and 2i + 1 by angles_i, (in / 2,).

    W is the attention's output matrix, so R turns what each head gives, in planes of two of its channels.

    The angles are searched for by Bayesian optimisation: each step (`before_step`) tries a point and measures
    `adapter.objective`, a function without arguments that returns a loss; the paper's is minus the mean probability of the
    answers to 10 or 20 examples. The angles are always the best ones so far; an optimiser sees no gradient.

    Args:
        bound: of each angle. pi / 6, as in the reference code for Llama and Mistral; pi / 4 for Phi-3 and Qwen2.
        trials: points in all, `uniform` of them drawn uniformly before the search begins; 4 and 120 more, as there.
        candidates: points of which each trial takes the one with the largest expected improvement.
        seed: of all that is drawn.

    Start: zero, which is the first point tried; the reference code never tries it. Its placement is the first 16 blocks
    (6 of Phi-3, 5 of Qwen2). It models the loss by BoTorch's Gaussian process with the kernel of an infinitely wide network
    and climbs the logarithm of the expected improvement; here it is scikit-learn's with a Matern kernel, and candidates
    are drawn, half of them uniformly and half near the best point. As written, that code looks for large losses and keeps
    the smallest; here small ones are looked for. Its other rotations (all channels by levels of planes, mlp) are left out.
    """

    measures: ClassVar[str] = "training"

    bound: PositiveFloat = math.pi / 6
    trials: PositiveInt = 124
    uniform: PositiveInt = 4
    candidates: PositiveInt = 1024
    seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> Tensors:
        angles = torch.zeros(site.inputs // 2)  # (in/2,)
        return {"angles": angles, "tried": running(angles.expand(self.trials, -1).clone())}  # (trials, in/2)

    def shared(self, sites: list[Site]) -> Tensors:
        return {"losses": running(torch.zeros(self.trials))}  # (trials,)

    def refuse(self, site: Site) -> str | None:
        return f"its {site.inputs} inputs are odd, and are turned two by two" if site.inputs % 2 else None

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {"angles": {"weight_decay": 0.0}}

    def gradient(self, part: Part, name: str, g: Tensor) -> Tensor:
        return torch.zeros_like(g)

    def weight(self, W: Tensor, angles: Tensor) -> Tensor:
        first, second = W.unflatten(-1, (-1, 2)).unbind(-1)  # (out, in/2) each
        c, s = angles.cos(), angles.sin()  # (in/2,)
        return torch.stack([c * first - s * second, s * first + c * second], dim=-1).flatten(-2)  # (out, in)

    @torch.no_grad()
    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        step = adapter.step
        if step >= self.trials:
            return
        if adapter.objective is None:
            raise AttunementError(
                f"TaRot: angles are searched for by a loss; set objective of the adapter {adapter.name!r} to a function "
                "without arguments that returns it, or train with at.Trainer"
            )
        tried = [part.tensor("tried").movedim(-2, 0) for part in parts]  # (trials, ..., in/2) each
        losses = parts[0].tensor("losses")  # (trials,)
        known = torch.cat([points[:step].flatten(1) for points in tried], dim=1)  # (step, angles)
        chunks = self._next(known, losses[:step]).split([points[0].numel() for points in tried])
        for part, points, chunk in zip(parts, tried, chunks, strict=True):
            points[step] = chunk.view(points[step].shape)
            part.tensor("angles").copy_(points[step])
        losses[step] = agreed(adapter.objective().detach().float()).to(losses)
        best = int(losses[: step + 1].argmin())
        for part, points in zip(parts, tried, strict=True):
            part.tensor("angles").copy_(points[best])

    def _next(self, known: Tensor, losses: Tensor) -> Tensor:
        """The point to try after these, (angles,)."""
        count, size = known.shape
        generator = drawn(self.seed, count)
        if count == 0:
            return known.new_zeros(size)
        if count <= self.uniform:
            return self._within(1, size, generator)[0].to(known)
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        kernel = ConstantKernel() * Matern(size**0.5, (1e-3 * size**0.5, 1e3 * size**0.5)) + WhiteKernel(1e-2)
        model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=self.seed)
        X, y = known.double().cpu() / self.bound, losses.double().cpu()
        best = X[y.argmin()]
        near = best + 0.2 * torch.randn(self.candidates // 2, size, generator=generator, dtype=torch.float64)
        far = self._within(self.candidates - len(near), size, generator) / self.bound
        points = torch.cat([far, near.clamp(-1, 1)])  # (candidates, angles)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fit that stops at a bound of its own parameters
            mean, spread = map(torch.from_numpy, model.fit(X, y).predict(points.numpy(), return_std=True))
        spread = spread.clamp_min(1e-12)
        z = (y.min() - mean) / spread
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        improvement = spread * (z * torch.special.ndtr(z) + density)  # (candidates,)
        return (points[improvement.argmax()] * self.bound).to(known)

    def _within(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        return self.bound * (2 * torch.rand(count, size, generator=generator, dtype=torch.float64) - 1)
