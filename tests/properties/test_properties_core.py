"""Start, size, training, merging and restoring, at every layer type."""

from __future__ import annotations

import pytest
import torch
from grid import LIVES, adapted, every_cell, every_home, gradients, loss, promise
from homes import PLACES, alone, home, out, run
from toy_model import TIED, bits, distance, look, same_bits

import attunement as at

EXACT = 1e-10


@every_cell
@promise("identity")
def test_identity_at_the_start(sample, layer):
    model = home(PLACES[layer].home)
    adapted(model, sample, layer, seed=None)
    assert distance(out(model), alone(model.home)) <= 1e-12


@every_cell
def test_a_change_of_its_tensors_changes_the_output(sample, layer):
    model = home(PLACES[layer].home)
    base = alone(model.home)
    adapted(model, sample, layer)
    changed = out(model)
    assert changed.shape == base.shape
    assert distance(changed, base) > 1e-4
    at.use(model, None)
    assert torch.equal(out(model), base)
    with at.using(model, "a"):
        assert torch.equal(out(model), changed)


@every_cell
@promise("step")
def test_a_step_changes_every_trained_tensor_and_nothing_else(sample, layer):
    model = home(PLACES[layer].home)
    seen, before = look(model), bits(model)
    adapter = adapted(model, sample, layer)
    trained = {id(p) for p in adapter.parameters()}
    assert trained
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    model.train()
    loss(run(model)).backward()
    found = gradients(adapter)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found.values()), found
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    fixed = {key: value.clone() for key, value in model.state_dict().items()}
    torch.optim.Adam(adapter.groups(lr=0.01)).step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, fixed[key])}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in trained}
    assert changed == names
    assert same_bits(bits(model), before)
    model.eval()
    adapter.detach()
    assert look(model) == seen
    assert same_bits(bits(model), before)
    assert torch.equal(out(model), alone(model.home))


@every_cell
@promise("merge")
def test_merge_equals_forward_and_unmerge_restores_the_bits(sample, layer):
    merge_equals_forward(home(PLACES[layer].home), sample, layer, EXACT)


@every_home
@promise("merge")
def test_merge_equals_forward_in_single_precision(sample, where):
    merge_equals_forward(home(where, torch.float32), sample, None, 1e-5)


def merge_equals_forward(model, sample, layer, bound) -> None:
    adapter = adapted(model, sample, layer)
    before, expected, keys = bits(model), out(model), set(model.state_dict())
    adapter.merge(untie=layer in TIED)
    assert distance(out(model), expected) <= bound
    at.use(model, None)
    assert distance(out(model), expected) <= bound, "merged is merged, whatever is active"
    at.use(model, "a")
    adapter.unmerge()
    assert same_bits(bits(model), before)
    assert set(model.state_dict()) == keys
    assert torch.equal(out(model), expected)


REFUSING = [(sample, where) for sample, where in LIVES if "merge" in sample.method.cannot]


@pytest.mark.parametrize(("sample", "where"), REFUSING, ids=[f"{sample.id}-{where}" for sample, where in REFUSING])
def test_a_refused_merge_changes_nothing(sample, where):
    model = home(where)
    adapter = adapted(model, sample)
    seen, before, expected = look(model), bits(model), out(model)
    with pytest.raises(at.AttunementError, match="merge"):
        adapter.merge()
    assert look(model) == seen
    assert same_bits(bits(model), before)
    assert torch.equal(out(model), expected)
    assert not adapter.merged
