"""Point 17: only what is active and trainable requires gradients, and nobody changes another's state."""

import pytest
import torch
from hostile import RECIPES, adapted, ids, tower

import attunement as at


def wants(adapter):
    found = {p.requires_grad for p in adapter.parameters()}
    assert len(found) == 1
    return found.pop()


def base_wants(model):
    return {name: p.requires_grad for name, p in model.named_parameters() if ".attuned." not in f".{name}"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_active_one_alone(recipe):
    model = tower()
    a = adapted(model, recipe, "a")
    assert wants(a)
    assert not any(base_wants(model).values())
    b = adapted(model, recipe, "b", seed=1)
    assert (wants(a), wants(b)) == (False, True)
    at.use(model, "a")
    assert (wants(a), wants(b)) == (True, False)
    at.use(model, None)
    assert (wants(a), wants(b)) == (False, False)
    for what in (at.Sum("a", "b"), at.Stack("b", "a"), at.Rows(["a", "b", None]), at.Weighted({"a": 0.5, "b": 0.5})):
        at.use(model, what)
        assert (wants(a), wants(b)) == (True, True)
    assert not any(base_wants(model).values())
    at.use(model, "b")
    with at.using(model, "a"):
        assert wants(a)
    at.use(model, "b")
    assert (wants(a), wants(b)) == (False, True)


def test_using_restores_what_required_gradients():
    """A block that built no graph leaves no parameter behind that DDP would wait for."""
    model = tower()
    a, b = adapted(model, "lora", "a"), adapted(model, "lora", "b", seed=1)
    with torch.no_grad(), at.using(model, "a"):
        model(ids())
    assert (wants(a), wants(b)) == (False, True)
    with at.using(model, "a"):
        loss = model(ids()).pow(3).sum()
    loss.backward()  # the graph of the block is still good
    assert all(p.grad is not None for p in a.parameters())
    at.use(model, "b")
    assert (wants(a), wants(b)) == (False, True)


def test_frozen_stays_frozen():
    model = tower()
    a, b = adapted(model, "lora", "a"), adapted(model, "lora", "b", seed=1)
    a.trainable = False
    for what in ("a", "b", at.Sum("a", "b"), None, "a"):
        at.use(model, what)
        assert not wants(a)
        assert a.trainable is False
        assert b.trainable is True
    at.use(model, at.Sum("a", "b"))
    assert (wants(a), wants(b)) == (False, True)
    a.trainable = True
    assert (wants(a), wants(b)) == (True, True)
    at.use(model, "b")
    assert not wants(a)
    a.trainable = False
    a.trainable = True
    assert not wants(a), "an inactive adapter does not require gradients even when it may train"


def test_loaded_frozen_unless_asked(tmp_path):
    model = tower()
    adapted(model, "mixed", "a").save(tmp_path / "a")
    at.detach(model)
    assert not wants(at.load(model, tmp_path / "a"))
    at.detach(model)
    assert wants(at.load(model, tmp_path / "a", trainable=True))


def test_detaching_the_last_restores_the_users_choice():
    model = tower()
    model.embedding.weight.requires_grad_(False)
    before = base_wants(model)
    adapted(model, "mixed", "a")
    adapted(model, "lora", "b")
    assert not any(base_wants(model).values())
    at.detach(model, "a")
    assert not any(base_wants(model).values())
    at.detach(model, "b")
    assert base_wants(model) == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("active", ["a", "b"])
def test_every_parameter_that_wants_a_gradient_gets_one(recipe, active):
    """What DDP calls unused is a parameter that requires a gradient and gets none."""
    model = tower().train()
    adapted(model, recipe, "a")
    adapted(model, recipe, "b", seed=1)
    at.use(model, active)
    model(ids()).pow(3).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_an_optimizer_over_everything_moves_the_active_adapter_only():
    model = tower()
    a, b = adapted(model, "mixed", "a"), adapted(model, "mixed", "b", seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    at.use(model, "a")
    model(ids()).pow(3).sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".attuned.a." in key for key in moved)
    assert {p.grad is None for p in b.parameters()} == {True}
    assert len(moved) == len(list(a.parameters()))
