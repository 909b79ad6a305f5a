"""Start, size, training, merging and restoring, at every layer type."""

from __future__ import annotations

import pytest
import torch
from grid import SAMPLES, adapted, every_cell, gradients, loss, perturb, promise
from toy_model import TIED, bits, distance, ids, look, out, same_bits, toy

import attunement as at

EXACT = 1e-10


@every_cell
@promise("identity")
def test_identity_at_the_start_and_different_after_a_perturbation(sample, layer):
    model = toy()
    base = out(model)
    adapter = adapted(model, sample, layer, seed=None)
    assert distance(out(model), base) <= 1e-12
    perturb(adapter)
    assert distance(out(model), base) > 1e-4
    at.use(model, None)
    assert torch.equal(out(model), base)


@every_cell
@promise("step")
def test_a_step_changes_every_trained_tensor_and_nothing_else(sample, layer):
    model = toy()
    seen, before, base = look(model), bits(model), out(model)
    adapter = adapted(model, sample, layer)
    trained = {id(p) for p in adapter.parameters()}
    assert trained
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    model.train()
    loss(model(ids())).backward()
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
    assert torch.equal(out(model), base)


@every_cell
@promise("merge")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_merge_equals_forward_and_unmerge_restores_the_bits(sample, layer, dtype, bound):
    model = toy(dtype)
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


@pytest.mark.parametrize("sample", [s for s in SAMPLES if "merge" in s.method.cannot], ids=lambda s: s.id)
def test_a_refused_merge_changes_nothing(sample):
    model = toy()
    adapter = adapted(model, sample)
    seen, before, expected = look(model), bits(model), out(model)
    with pytest.raises(at.AttunementError, match="merge"):
        adapter.merge()
    assert look(model) == seen
    assert same_bits(bits(model), before)
    assert torch.equal(out(model), expected)
    assert not adapter.merged
