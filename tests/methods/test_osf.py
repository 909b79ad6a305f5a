"""OSF: what stays, what is projected, and that any basis of the same directions serves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attunement as at
from attunement.subspace import decomposed


def model(out: int, inputs: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, out, dtype=dtype))


SHAPES = pytest.mark.parametrize(("out", "inputs"), [(6, 10), (10, 6), (8, 8)])


@SHAPES
@pytest.mark.parametrize("projected", [True, False])
def test_plain_steps_leave_the_large_directions_as_they_are(out: int, inputs: int, projected: bool) -> None:
    net = model(out, inputs)
    W = net[0].weight.detach().clone()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    adapter = at.adapt(net, at.OSF(frozen=3), on="0")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(5):
        net(torch.randn(7, inputs, dtype=torch.float64)).square().mean().backward()
        if projected:
            adapter.before_step()
        optimizer.step()
        optimizer.zero_grad()
    adapter.merge()
    change = net[0].weight.detach() - W
    assert change.norm() > 1e-2
    moved = max((U[:, :3].T @ change).norm(), (change @ Vh[:3].T).norm())
    assert moved < 1e-10 if projected else moved > 1e-3


@SHAPES
def test_is_the_formula_in_any_basis(out: int, inputs: int) -> None:
    net, least = model(out, inputs), min(out, inputs)
    W = net[0].weight.detach().clone()
    adapter = at.adapt(net, at.OSF(), on="0")
    (part,) = adapter.parts
    m = least - least // 2
    tail = (part.tensor("U_base")[:, -m:] * part.tensor("S_base")[-m:]) @ part.tensor("Vh_base")[-m:]
    for name in ("U", "S", "Vh"):
        part.tensor(name).add_(0.2 * torch.randn(part.tensor(name).shape, dtype=torch.float64))
    expected = W - tail + (part.tensor("U") * part.tensor("S")) @ part.tensor("Vh")
    x = torch.randn(3, inputs, dtype=torch.float64)
    torch.testing.assert_close(net(x), x @ expected.T + net[0].bias)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(least)[:least]  # what another machine's SVD may give
    part.tensor("U_base").mul_(signs)
    part.tensor("Vh_base").mul_(signs[:, None])
    torch.testing.assert_close(net(x), x @ expected.T + net[0].bias)
    assert adapter.count() == m * (out + inputs + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    net, x = model(8, 8, dtype), torch.randn(3, 8, dtype=dtype)
    before = net(x)
    at.adapt(net, at.OSF(), on="0")
    assert torch.equal(net(x), before)


def test_refuses_to_keep_all() -> None:
    with pytest.raises(at.AttunementError, match=r"leave none of a 4 x 6 matrix; the most are 3"):
        at.adapt(model(4, 6), at.OSF(frozen=4), on="0")


@pytest.mark.parametrize("shape", [(96, 96), (96, 200), (200, 96)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])  # none, what squares in double precision hold, what none hold
def test_a_decomposition_by_squares_is_as_exact_as_an_svd(shape: tuple[int, int], decay: float) -> None:
    U, S, Vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    W = (U * torch.arange(1, 97) ** -decay) @ Vh if decay else (U * S) @ Vh
    exact, usual = (torch.linalg.svd(M, full_matrices=False) for M in (W.double(), W))
    for leading in (8, 48, 96):
        found = decomposed(W, leading)
        for k, least in ((96, 1e-6), (leading, 1e-5)):
            errors = [((U[:, :k] * S[:k]) @ Vh[:k] - (exact.U[:, :k] * exact.S[:k]) @ exact.Vh[:k]).norm() / W.norm()
                      for U, S, Vh in (found, usual)]  # fmt: skip
            assert errors[0] < least + 2 * errors[1]
        U, S, Vh = found
        torch.testing.assert_close(S[:leading].double(), exact.S[:leading], rtol=1e-5, atol=1e-6 * float(S[0]))
        for basis in (U[:, :leading], Vh[:leading].mT):
            assert (basis.mT @ basis - torch.eye(leading)).abs().max() < 1e-4
