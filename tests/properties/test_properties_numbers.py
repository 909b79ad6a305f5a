"""Precisions, gradients, recomputation and compilation."""

from __future__ import annotations

import functools

import pytest
import torch
from grid import SAMPLES, adapted, dealt, every_cell, every_sample, gradients, loss, perturb, promise
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from toy_model import TIED, bits, distance, ids, out, toy

import attunement as at

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ROUNDINGS = 3  # adapted and bare model round alike: their errors are of one size
MANY = ids(12)


def error(found, exact) -> float:
    """Relative, over all values: the largest of them is too much a matter of chance to bound closely."""
    return float((found.double() - exact).norm() / exact.norm())


def in_double(model, sample, layer):
    """The same base and the same adapter with all arithmetic in float64; and what that base gives alone."""
    double = toy()
    double.load_state_dict({key: value.double() for key, value in bits(model).items()})
    base = out(double, MANY)
    state = at.adapters(model)["a"].state()
    adapted(double, sample, layer).load_state({key: value.double() for key, value in state.items()})
    return double, base


@every_cell
@promise("half")
@HALVES
def test_half_precision_adds_no_more_error_than_the_base_has(sample, layer, dtype):
    model = toy(torch.float32).to(dtype)
    base = out(model, MANY)
    adapter = adapted(model, sample, layer)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    double, exact = in_double(model, sample, layer)
    bound = ROUNDINGS * error(base, exact)
    expected = out(double, MANY)
    logits = model(MANY)
    assert logits.dtype == dtype
    assert error(logits.detach(), expected) <= bound
    loss(logits.float()).backward()
    loss(double(MANY)).backward()
    exactly = gradients(at.adapters(double)["a"])
    for name, gradient in gradients(adapter).items():
        assert gradient.dtype == torch.float32
        assert error(gradient, exactly[name]) <= 0.25, name
    if "merge" not in sample.method.cannot:
        adapter.merge(untie=layer in TIED)
        assert error(out(model, MANY), expected) <= bound, "merged"


@every_cell
@promise("autocast")
def test_autocast_adds_no_more_error_than_the_base_has(sample, layer):
    model = toy(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        base = out(model, MANY)
    adapter = adapted(model, sample, layer)
    double, exact = in_double(model, sample, layer)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(MANY)
    assert error(logits.detach(), out(double, MANY)) <= ROUNDINGS * error(base, exact)
    loss(logits.float()).backward()
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients(adapter).values())


@every_cell
@promise("gradcheck")
def test_gradients_are_those_of_the_function(sample, layer):
    model = toy()
    adapter = adapted(model, sample, layer)
    function = lambda *_: loss(model(ids()))  # noqa: E731 - the parameters are moved in place
    assert torch.autograd.gradcheck(function, tuple(adapter.parameters()), fast_mode=True, raise_exception=False)


@every_sample
@promise("checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_recomputed_gradients_are_equal(sample, reentrant):
    model, plain = toy(), toy()
    model._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    for one in (model, plain):
        torch.manual_seed(0)
        adapted(one, sample, name="a")
        adapted(one, sample, name="b", seed=1)
        with at.using(one, "a"):
            logits = one(ids())
        loss(logits).backward()  # the recomputation runs after the block has ended, when "b" is active
    expected = gradients(at.adapters(plain)["a"])
    for name, gradient in gradients(at.adapters(model)["a"]).items():
        assert distance(gradient, expected[name]) <= 1e-10, name
    assert all(p.grad is None or not p.grad.any() for p in at.adapters(model)["b"].parameters())


@pytest.mark.parametrize("turn", range(2))
def test_one_graph_and_no_recompilation_on_a_swap(turn, fresh_compiler):
    """Compiling takes seconds, so all methods stand in one model, each at other layers in every turn."""
    samples = [sample for sample in SAMPLES if "compile" not in sample.method.cannot]
    one_graph(dealt(samples, turn))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if "compile" in s.method.cannot], ids=lambda sample: sample.id)
@promise("compile")
def test_what_cannot_be_compiled_indeed_cannot(sample, fresh_compiler):
    one_graph({sample.everywhere(): sample.method})


def one_graph(recipe) -> None:
    model = toy(torch.float32)
    expected = {}
    for seed, name in enumerate("ab"):
        perturb(at.adapt(model, recipe, name=name), seed)
        expected[name] = out(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert distance(out(compiled), expected["b"]) <= 1e-5
    for name in "aba":
        at.use(model, name)
        assert distance(out(compiled), expected[name]) <= 1e-5
    assert counter.frame_count == 1
