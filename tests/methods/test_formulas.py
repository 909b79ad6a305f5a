"""Each method's expression against the formula of its paper, written out on its own, in float64."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attunement as at
from attunement.fields import misfit
from attunement.method import product, tagged

OUT, IN, WIDTH = 6, 4, 5


def site(W: Tensor, **more: Any) -> Any:
    fields = {"role": "attention.value", "parameter": "weight", "name": "layer", "module": nn.Linear(1, 1)}
    return SimpleNamespace(weight=W, outputs=W.shape[0], inputs=W.shape[-1], **{**fields, **more})


def values(method: at.Method, *sites: Any, disturb: float = 0.0) -> dict[str, Tensor]:
    """A method's tensors at the first site in float64, the trained ones disturbed."""
    found = {**tagged(method.tensors(sites[0])), **tagged(method.shared(list(sites)))}
    return {
        name: value + disturb * torch.randn(value.shape, dtype=torch.float64)
        if kind == "trained"
        else value.double()
        if value.is_floating_point()
        else value
        for name, (kind, value) in found.items()
    }


def changed(method: Any, W: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The new weight, from whichever form a method has."""
    form = next(form for form in ("factors", "delta", "weight") if hasattr(method, form))
    taken = inspect.signature(getattr(method, form)).parameters
    made = getattr(method, form)(W, **{name: value for name, value in tensors.items() if name in taken})
    return made if form == "weight" else W + (product(made) if form == "factors" else made)


@pytest.fixture
def W() -> Tensor:  # noqa: N802
    return torch.randn(OUT, IN, dtype=torch.float64)


MATRIX_METHODS = [
    at.LoRA(rank=2),
    at.LoRA(rank=4, rank_stabilised=True),
    at.DoRA(rank=2),
    at.VeRA(rank=7),
    at.SVFit(),
    at.SVFit(rank=2),
    at.HRA(rank=2),
    at.HRA(rank=4),
    at.DEFT(rank=2),
    at.DEFT(rank=3, decomposition="qr", alpha=2),
    at.SuperTuning(density=0.3),
    at.SuperTuning(density=0.3, rank=2),
    at.SSF(),
    at.IA3(),
    at.Train(),
    at.Train(rows=(1, -1)),
]


@pytest.mark.parametrize("method", MATRIX_METHODS, ids=repr)
def test_starts_at_no_change_and_leaves_it(method: at.Method, W: Tensor) -> None:
    here = site(W)
    torch.testing.assert_close(changed(method, W, values(method, here)), W, atol=1e-6, rtol=0)
    assert (changed(method, W, values(method, here, disturb=0.1)) - W).abs().max() > 1e-3


@pytest.mark.parametrize(
    "method", [at.LoRA(rank=2), at.VeRA(rank=7), at.SVFit(), at.SSF(), at.IA3(), at.Train()], ids=repr
)
def test_the_start_is_exact_where_the_formula_is(method: at.Method, W: Tensor) -> None:
    assert torch.equal(changed(method, W, values(method, site(W))), W)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (at.LoRA(rank=2), 1.0),
        (at.LoRA(rank=2, alpha=6), 3.0),
        (at.LoRA(rank=4, alpha=6, rank_stabilised=True), 3.0),
        (at.LoRA(rank=4, rank_stabilised=True), 2.0),
    ],
)
def test_lora(method: at.LoRA, scale: float, W: Tensor) -> None:
    t = values(method, site(W), disturb=1.0)
    torch.testing.assert_close(changed(method, W, t), W + scale * t["B"] @ t["A"])


def test_lora_starts_as_nn_linear_does(W: Tensor) -> None:
    A = values(at.LoRA(rank=4), site(torch.randn(64, 64)))["A"]
    assert A.abs().max() <= 1 / math.sqrt(64)
    assert A.std() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.15)


def test_lora_plus_only_changes_one_rate() -> None:
    assert at.LoRA(lora_plus=16).rates() == {"B": {"lr": 16.0}}
    assert at.LoRA().rates() == {}


def test_a_head_may_have_a_rate_of_its_own() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    adapter = at.adapt(model, {"body": at.LoRA(rank=2), "re:head": at.Train(rate=10)})
    rates = {id(p): group["lr"] for group in adapter.groups(lr=1e-3) for p in group["params"]}
    found = {name.split(".")[0]: rates[id(p)] for name, p in adapter.named_parameters()}
    assert found == pytest.approx({"body": 1e-3, "head": 1e-2})


def test_dora(W: Tensor) -> None:
    method = at.DoRA(rank=2, alpha=4)
    t = values(method, site(W), disturb=0.5)
    V = W + 2.0 * t["B"] @ t["A"]
    expected = torch.stack([t["magnitude"][row] * V[row] / V[row].norm() for row in range(OUT)])
    torch.testing.assert_close(changed(method, W, t), expected)


def test_dora_holds_the_norm_constant_for_the_gradient(W: Tensor) -> None:
    method = at.DoRA(rank=2)
    t = {name: value.requires_grad_() for name, value in values(method, site(W), disturb=0.5).items()}
    target = torch.randn_like(W)
    (changed(method, W, t) * target).sum().backward()
    V = (W + t["B"] @ t["A"]).detach()
    outer = (t["magnitude"].detach() / V.norm(dim=1))[:, None] * target  # what reaches V if its norm is a constant
    torch.testing.assert_close(t["B"].grad, outer @ t["A"].detach().T)
    torch.testing.assert_close(t["magnitude"].grad, (V * target).sum(1) / V.norm(dim=1))


def test_dora_keeps_a_row_of_zeros(W: Tensor) -> None:
    W[2] = 0
    assert torch.equal(changed(at.DoRA(rank=2), W, values(at.DoRA(rank=2), site(W))), W)


def test_vera_cuts_one_pair_for_unlike_matrices(W: Tensor) -> None:
    method, other = at.VeRA(rank=7, start=0.3), torch.randn(3, 9, dtype=torch.float64)
    for one, rest in ((W, other), (other, W)):
        t = values(method, site(one), site(rest), disturb=0.5)
        assert t["A"].shape == (7, 9)
        assert t["B"].shape == (OUT, 7)
        out, inputs = one.shape
        expected = one + torch.diag(t["b"]) @ t["B"][:out] @ torch.diag(t["d"]) @ t["A"][:, :inputs]
        torch.testing.assert_close(changed(method, one, t), expected)


def test_vera_draws_what_peft_draws(W: Tensor) -> None:
    model = pytest.importorskip("peft.tuners.vera.model", reason="the peft package is the reference")
    generator = torch.Generator().manual_seed(5)
    A, B = (model._kaiming_init(shape, generator) for shape in ((7, IN), (OUT, 7)))
    ours = tagged(at.VeRA(rank=7, seed=5).shared([site(W)]))
    assert torch.equal(ours["A"].value, A)
    assert torch.equal(ours["B"].value, B)


def test_vera_stores_its_pair_only_when_asked(W: Tensor) -> None:
    assert {kind for kind, _ in tagged(at.VeRA(rank=2).shared([site(W)])).values()} == {"seeded"}
    assert {kind for kind, _ in tagged(at.VeRA(rank=2, stored=True).shared([site(W)])).values()} == {"fixed"}


def test_svfit(W: Tensor) -> None:
    method = at.SVFit(rank=2)
    t = values(method, site(W), disturb=0.5)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = U @ torch.diag(torch.cat([t["sigma"], sigma[2:]])) @ Vh
    torch.testing.assert_close(changed(method, W, t), expected)


@pytest.mark.parametrize("rank", [2, 4])
def test_hra_is_the_product_of_its_reflections(rank: int, W: Tensor) -> None:
    method = at.HRA(rank=rank)
    t = values(method, site(W), disturb=1.0)
    expected = W
    for u in t["u"].T:
        expected = expected @ (torch.eye(IN) - 2 * torch.outer(u, u) / u.dot(u))
    torch.testing.assert_close(changed(method, W, t), expected)
    torch.testing.assert_close(changed(method, W, t) @ changed(method, W, t).T, W @ W.T)  # angles and lengths stay


def test_hra_gradient_through_coinciding_reflections(W: Tensor) -> None:
    method = at.HRA(rank=4)
    u = values(method, site(W))["u"].requires_grad_()
    assert torch.autograd.gradcheck(lambda u: product(method.factors(W, u)), (u,))


def test_hra_penalty_vanishes_for_orthogonal_reflections(W: Tensor) -> None:
    method = at.HRA(rank=2, regularisation=0.5)
    assert float(method.penalty(torch.eye(IN, 2, dtype=torch.float64) * 3)) == 0
    u = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert float(method.penalty(u)) == pytest.approx(0.5 * 2)  # two ones off the diagonal


@pytest.mark.parametrize("decomposition", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
def test_deft(decomposition: Any, para: bool, W: Tensor) -> None:
    method = at.DEFT(rank=2, decomposition=decomposition, alpha=6, para=para)
    t = values(method, site(W), disturb=1.0)
    Q, S = t["P"], F.relu(t["P"])
    if decomposition == "qr":
        Q = torch.linalg.qr(t["P"]).Q
        Q = S = Q * (Q * t["P"]).sum(0).sign()  # towards the columns of P
    expected = (torch.eye(OUT) - Q @ S.T) @ W + (0 if para else 3.0 * Q @ t["R"])
    torch.testing.assert_close(changed(method, W, t), expected)
    if para and decomposition == "qr":
        torch.testing.assert_close(t["P"].T @ changed(method, W, t), torch.zeros(2, IN, dtype=torch.float64))


def test_deft_does_not_jump_where_an_entry_passes_zero(W: Tensor) -> None:
    method = at.DEFT(rank=2, decomposition="qr")
    t = values(method, site(W), disturb=1.0)
    above, below = t["P"].clone(), t["P"].clone()
    above[0, 0], below[0, 0] = 1e-9, -1e-9
    torch.testing.assert_close(changed(method, W, t | {"P": above}), changed(method, W, t | {"P": below}))


@pytest.mark.parametrize("largest", [True, False])
def test_super_tuning(largest: bool, W: Tensor) -> None:
    method = at.SuperTuning(density=0.25, largest=largest, rank=2)
    t = values(method, site(W), disturb=1.0)
    D = changed(method, W, t) - W - 2.0 * t["B"] @ t["A"]  # alpha is twice the rank
    moved = D.abs() > 1e-12
    assert int(moved.sum()) == 6
    inside, outside = W[moved].abs(), W[~moved].abs()
    assert inside.min() > outside.max() if largest else inside.max() < outside.min()


def test_beft_shifts_the_output(W: Tensor) -> None:
    t = values(at.BEFT(), site(W), disturb=0.5)
    x, b = torch.randn(3, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    y = at.BEFT().output(None, F.linear(x, W, b), **t)
    torch.testing.assert_close(y, F.linear(x, W) + b + t["shift"])
    torch.testing.assert_close(y, F.linear(x, at.BEFT().weight(W), at.BEFT().bias(b, **t)))


def test_ssf_in_both_forms(W: Tensor) -> None:
    t = values(at.SSF(), site(W), disturb=0.5)
    x, b = torch.randn(3, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    y = at.SSF().output(None, F.linear(x, W, b), **t)
    torch.testing.assert_close(y, t["gamma"] * F.linear(x, W, b) + t["beta"])
    torch.testing.assert_close(y, F.linear(x, at.SSF().weight(W, t["gamma"]), at.SSF().bias(b, **t)))


@pytest.mark.parametrize(
    ("method", "role", "form"),
    [
        (at.IA3(), "attention.key", "output"),
        (at.IA3(), "mlp.down", "input"),
        (at.IA3(side="output"), "mlp.down", "output"),
        (at.IA3(side="input"), "attention.key", "input"),
    ],
)
def test_ia3_in_both_forms(method: at.IA3, role: str, form: str, W: Tensor) -> None:
    here = site(W, role=role)
    assert method.form(here) == form
    t = values(method, here, disturb=0.5)
    x, b = torch.randn(3, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    if form == "input":
        y = F.linear(method.input(x, **t), W, b)
        torch.testing.assert_close(y, F.linear(x * t["columns"], W, b))
    else:
        y = method.output(None, F.linear(x, W, b), **t)
        torch.testing.assert_close(y, F.linear(x, W, b) * t["rows"])
    rows = {name: value for name, value in t.items() if name == "rows"}
    torch.testing.assert_close(y, F.linear(x, method.weight(W, **t), method.bias(b, **rows)))


@pytest.mark.parametrize(
    ("style", "scale", "parallel", "placement"),
    [
        ("houlsby", 1, False, "attention|mlp"),
        ("pfeiffer", 1, False, "mlp"),
        ("parallel", 1, True, "mlp"),
        ("scaled_parallel", 4, True, "mlp"),
    ],
)
@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", nn.ReLU()), ("gelu", nn.GELU()), ("silu", nn.SiLU()), ("tanh", nn.Tanh())],
)
def test_bottleneck(
    style: Any, scale: float, parallel: bool, placement: str, activation: Any, function: nn.Module
) -> None:
    method = at.Bottleneck(size=3, style=style, activation=activation)
    assert method.placement == placement
    assert method.reads_input() == parallel
    here = SimpleNamespace(inputs=IN, outputs=WIDTH)
    x, y = torch.randn(2, 7, IN, dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    assert torch.equal(method.output(x, y, **values(method, here)), y)
    t = values(method, here, disturb=0.5)
    h = x if parallel else y
    inner = function(h @ t["down"].T + t["down_bias"])
    torch.testing.assert_close(method.output(x, y, **t), y + scale * (inner @ t["up"].T + t["up_bias"]))


def test_train_replaces_a_parameter_or_its_rows(W: Tensor) -> None:
    t = values(at.Train(), site(W), disturb=0.5)
    assert torch.equal(changed(at.Train(), W, t), t["copy"])
    assert at.Train().carried(W).numel() == 0
    method = at.Train(rows=(-1, 2))
    t = values(method, site(W), disturb=0.5)
    expected = W.clone()
    expected[-1], expected[2] = t["copy"]
    assert torch.equal(changed(method, W, t), expected)
    assert torch.equal(method.carried(W), W[[0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("method", "here", "words"),
    [
        (at.LoRA(rank=5), {}, "rank 5 is larger than a 6 x 4 matrix has; the largest is 4"),
        (at.DoRA(rank=5), {}, "the largest is 4"),
        (at.SVFit(rank=5), {}, "the largest is 4"),
        (at.HRA(rank=6), {}, "rank 6 is larger than its 4 inputs; the largest is 4"),
        (at.DEFT(rank=5), {}, "the largest is 4"),
        (at.SuperTuning(rank=1), {}, "it has 24 entries, of which a share of 0.01 is none"),
        (at.SuperTuning(density=0.5, rank=5), {}, "the largest is 4"),
        (at.Train(rows=(6,)), {}, "row 6 is outside its 6 rows; the last is 5"),
        (at.Train(rows=(-7,)), {}, "row -7 is outside its 6 rows; resize_token_embeddings adds rows, before adapting"),
        (at.Train(only="bias"), {"parameter": "weight"}, "'weight' is left out by only='bias'"),
        (at.Train(only="weight"), {"parameter": "in_proj_bias"}, "'in_proj_bias' is left out by only='weight'"),
        (at.IA3(side="input"), {"module": nn.Conv2d(1, 1, 2)}, "columns are not channels"),
    ],
)
def test_refuses_a_site(method: at.Method, here: dict[str, Any], words: str, W: Tensor) -> None:
    assert words in str(misfit(method, site(W, **here)))


@pytest.mark.parametrize("method", MATRIX_METHODS, ids=repr)
def test_takes_a_site(method: at.Method, W: Tensor) -> None:
    assert misfit(method, site(W)) is None


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (at.LoRA, {"rank": 0}, "LoRA: rank must be greater than 0, got 0"),
        (at.LoRA, {"dropout": 1.0}, "LoRA: dropout must be less than 1"),
        (at.LoRA, {"alpha": -1}, "LoRA: alpha must be greater than 0"),
        (at.DoRA, {"dropout": 0.1}, "DoRA has no field 'dropout'"),
        (at.LoRA, {"use_dora": True}, r"no field 'use_dora'.*that is `at\.DoRA`"),
        (at.LoRA, {"target_modules": ["q_proj"]}, r"no field 'target_modules'.*at\.adapt\(\.\.\., on=\.\.\.\)"),
        (at.VeRA, {"seed": -1}, "VeRA: seed must be greater than or equal to 0"),
        (at.Bottleneck, {"style": "holsby"}, "Bottleneck: style must be 'houlsby', 'pfeiffer'"),
        (at.Train, {"only": "norm"}, "Train: only must be 'all', 'weight' or 'bias'"),
        (at.IA3, {"side": "left"}, "IA3: side must be"),
    ],
)
def test_refuses_a_field(cls: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(at.AttunementError, match=words):
        cls(**fields)


@pytest.mark.parametrize("name", at.methods())
def test_reads_back_what_it_describes(name: str) -> None:
    cls = at.method(name)
    made = cls()
    assert at.method(name.partition("/")[2]) is cls
    assert cls.source.startswith(
        ("https://arxiv.org/abs/", "https://openreview.net/", "https://doi.org/", "https://github.com/")
    )
    fields = made.describe()
    assert fields.pop("method") == name
    assert cls(**fields) == made
