"""Optimisers in a low rank: against the algorithms of the papers' code, around other optimisers, and resumed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attunement as at
from attunement.optim import GaLore, GradNormLoRP


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)).double()


X = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: nn.Module) -> Tensor:
    return (model(X) - X[:, :10].sin()).square().mean()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class Reference:
    """The published step, written out: Adam on the projected gradient, its direction projected back."""

    def __init__(self, lr: float, rank: int, gap: int, scale: float, kind: str, decay: float = 0.0) -> None:
        self.lr, self.rank, self.gap, self.scale, self.kind, self.decay = lr, rank, gap, scale, kind, decay
        self.states: dict[Tensor, dict] = {}

    def project(self, state: dict, G: Tensor) -> Tensor:
        tall = G.shape[0] >= G.shape[1]
        side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(
            self.kind, self.kind
        )
        if state["t"] % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            state["P"], state["Q"] = U[:, : self.rank], Vh[: self.rank]
        P, Q = state["P"], state["Q"]
        low, state["back"] = {
            "right": (G @ Q.T, lambda R: R @ Q),
            "left": (P.T @ G, lambda R: P @ R),
            "full": (P.T @ G @ Q.T, lambda R: P @ R @ Q),
        }[side]
        return low

    def adam(self, state: dict, name: str, g: Tensor) -> Tensor:
        m, s, t = state.get(f"m{name}", 0 * g), state.get(f"s{name}", 0 * g), state["t"] + 1
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        state[f"m{name}"], state[f"s{name}"] = m, s
        return (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (s.sqrt() + 1e-14)

    @torch.no_grad()
    def step(self, p: Tensor) -> None:
        state = self.states.setdefault(p, {"t": 0})
        move = self.adam(state, "", self.project(state, p.grad))
        p -= self.lr * self.scale * state["back"](move)
        p -= self.lr * self.decay * p
        state["t"] += 1


class Normalised(Reference):
    """The published code of the weight-normalised one."""

    @torch.no_grad()
    def step(self, p: Tensor) -> None:
        state = self.states.setdefault(p, {"t": 0, "v": p.clone()})
        v = state["v"]
        norm = v.norm(dim=1, keepdim=True)
        g = norm
        low = self.project(state, p.grad * g / norm)
        grad_g = (p.grad * v / norm).sum(1, keepdim=True)
        v = v - self.lr * self.scale * state["back"](self.adam(state, "v", low))
        g = g - self.lr * self.adam(state, "g", grad_g)
        v, g = v - self.lr * self.decay * v, g - self.lr * self.decay * g
        state["v"] = v
        p.copy_(g * v / v.norm(dim=1, keepdim=True))
        state["t"] += 1


def against(reference: Reference, make, steps: int = 7) -> None:
    model, other = net(), net()
    matrices = [p for p in other.parameters() if p.dim() == 2]
    rest = torch.optim.AdamW(
        [p for p in other.parameters() if p.dim() == 1], lr=reference.lr, eps=1e-14, weight_decay=0
    )
    optimizer = make(model)
    for _ in range(steps):  # "full" starts from a diagonal: what is rounding beside it counts as much for Adam
        run(model, optimizer, 1)
        other.zero_grad()
        loss(other).backward()
        for p in matrices:
            reference.step(p)
        rest.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 if reference.kind != "full" else 1e-4)


def groups(model: nn.Module, decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "rank": None, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full"])
def test_galore_takes_the_steps_of_the_reference(kind):
    own = {"rank": 3, "update_proj_gap": 3, "scale": 0.5, "proj_type": kind}
    against(
        Reference(0.02, 3, 3, 0.5, kind, 0.1),
        lambda m: GaLore(groups(m, 0.1), torch.optim.AdamW, lr=0.02, eps=1e-14, **own),
    )


def test_grad_norm_lorp_takes_the_steps_of_the_reference():
    own = {"rank": 3, "update_proj_gap": 3, "scale": 0.5, "published": True}
    against(
        Normalised(0.02, 3, 3, 0.5, "std", 0.1),
        lambda m: GradNormLoRP(groups(m, 0.1), torch.optim.AdamW, lr=0.02, eps=1e-14, **own),
    )


def test_grad_norm_lorp_descends_weight_normalisation():
    """Where the rank holds the whole gradient it is the inner optimiser on PyTorch's own parametrisation."""
    model, other = net(), net()
    nn.utils.parametrizations.weight_norm(other[0], dim=0)
    first = model[0].weight.clone()
    own = {"rank": 8, "proj_type": "right", "update_proj_gap": 1, "scale": 1.0}
    optimizer = GradNormLoRP(model[0].parameters(), torch.optim.SGD, lr=0.5, **own)
    run(model, optimizer, 5)
    run(other, torch.optim.SGD(other[0].parameters(), lr=0.5), 5)
    assert (model[0].weight - first).abs().max() > 0.01
    torch.testing.assert_close(model[0].weight, other[0].weight)


@pytest.mark.parametrize("kind", [GaLore, GradNormLoRP])
@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.02}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adafactor, {"lr": 0.02}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_any_optimiser_descends_and_a_resumed_run_is_the_same(kind, inner, options, tmp_path):
    make = lambda m: kind(m.parameters(), inner, rank=3, update_proj_gap=3, scale=1.0, **options)  # noqa: E731
    model = net()
    before = loss(model).item()
    optimizer = make(model)
    run(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at.pt")
    expected = run(model, optimizer, 5)
    assert loss(model).item() < before
    again = net()
    saved = torch.load(tmp_path / "at.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    other = make(again)
    other.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(run(again, other, 5), expected, strict=True))


def test_what_is_remembered_has_the_low_rank_and_a_schedule_reaches_it():
    model = net()
    optimizer = GaLore(model.parameters(), torch.optim.AdamW, lr=0.02, rank=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    run(model, optimizer, 1)
    sizes = sorted(tuple(s["exp_avg"].shape) for s in optimizer.inner.state.values())
    assert sizes == [(2, 12), (8,), (10,), (10, 2)]
    before = [p.clone() for p in model.parameters()]
    schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(run(model, optimizer, 1), before, strict=True))


def test_it_moves_what_an_adapter_trains_and_refuses_what_it_cannot_take():
    model = net()
    adapter = at.adapt(model, {"0|2": at.Train(), "head": None})
    before = {key: value.clone() for key, value in adapter.state().items()}
    run(model, GaLore(adapter.groups(lr=0.02), rank=2), 2)
    assert all(not torch.equal(value, before[key]) for key, value in adapter.state().items())
    for wrong, said in (
        ({"rank": 0}, "rank must be"),
        ({"proj_type": "lft"}, "nearest: 'left'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"update_proj_gap": 0}, "update_proj_gap must be"),
    ):
        with pytest.raises(at.AttunementError, match=said):
            GaLore(net().parameters(), **wrong)
    with pytest.raises(at.AttunementError, match="another optimiser"):
        GaLore(net().parameters(), lr=0.1).load_state_dict(torch.optim.AdamW(net().parameters()).state_dict())
