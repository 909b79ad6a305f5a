"""Point 3: without a plan the base runs, bit for bit; plans are made by `use`, never in `forward`."""

import copy
import pickle

import pytest
import torch
from hostile import RECIPES, adapted, bert, gpt2, ids, llama, logits, tower

import attunement as at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_none_is_the_base_bit_for_bit(recipe, dtype):
    model = tower(dtype)
    bare = logits(model, ids())
    adapted(model, recipe, "a")
    out = logits(model, ids())
    assert not torch.equal(out, bare)
    adapted(model, recipe, "b", seed=1)
    at.use(model, None)
    assert torch.equal(logits(model, ids()), bare)
    at.use(model, "a")
    assert torch.equal(logits(model, ids()), out)
    with at.using(model, None):
        assert torch.equal(logits(model, ids()), bare)
        with at.using(model, "a"):
            assert torch.equal(logits(model, ids()), out)
        assert torch.equal(logits(model, ids()), bare)
    assert torch.equal(logits(model, ids()), out)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_none_is_the_base_in_transformers(make):
    model = make()
    bare = logits(model, ids())
    adapter = at.adapt(model, {"*": at.LoRA(rank=2)}, name="a")
    at.use(model, None)
    assert torch.equal(logits(model, ids()), bare)
    at.detach(model)
    at.adapt(model, {"attention.*": at.DoRA(rank=2), "mlp": at.Bottleneck(size=2)}, name="a")
    with at.using(model, None):
        assert torch.equal(logits(model, ids()), bare)
    assert adapter.name == "a"


def test_an_empty_row_and_an_empty_combination_are_the_base():
    model = tower()
    bare = logits(model, ids())
    adapted(model, "mixed", "a")
    with at.using(model, at.Rows([None, None, None])):
        assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_changes_no_module(recipe):
    """Nothing is resolved or remembered while running: attributes, classes, hooks and state keys stay."""
    model = tower()
    adapted(model, recipe)

    def snapshot():
        return [
            (type(m), sorted(vars(m)), {k: id(v) for k, v in m._parameters.items()}, sorted(m._buffers))
            for m in model.modules()
        ]

    before, keys = snapshot(), list(model.state_dict())
    model(ids()).sum().backward()
    logits(model, ids())
    assert snapshot() == before
    assert list(model.state_dict()) == keys


def test_an_exception_inside_using_restores_what_was_active():
    model = tower()
    adapted(model, "lora", "a")
    out = logits(model, ids())
    adapted(model, "lora", "b", seed=1)
    at.use(model, "a")

    def fail():
        with at.using(model, at.Sum("a", "b")):
            logits(model, ids())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(logits(model, ids()), out)


def test_an_exception_inside_forward_leaves_nothing_behind():
    model = tower()
    adapted(model, "vera", "a")
    out = logits(model, ids())
    handle = model.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids())
    handle.remove()
    assert torch.equal(logits(model, ids()), out)
    at.use(model, None)
    logits(model, ids())


@pytest.mark.parametrize("wrong", ["b", at.Sum("a", "b"), at.Rows(["a", "b"]), at.Weighted({"aa": 1.0}), 3])
def test_use_of_an_unknown_name_is_refused_and_changes_nothing(wrong):
    model = tower()
    adapted(model, "lora", "a")
    out = logits(model, ids())
    with pytest.raises(at.AttunementError):
        at.use(model, wrong)
    assert torch.equal(logits(model, ids()), out)
    with pytest.raises(at.AttunementError), at.using(model, wrong):
        pass
    assert torch.equal(logits(model, ids()), out)


def test_rows_of_the_wrong_length_are_refused_at_the_entrance():
    model = tower()
    adapted(model, "lora", "a")
    calls = []
    model.embedding.register_forward_hook(lambda *_: calls.append(1))
    with at.using(model, at.Rows(["a", None])), pytest.raises(at.AttunementError, match=r"2.*3|3.*2"):
        model(ids(batch=3))
    assert not calls


@pytest.mark.parametrize("recipe", ["parallel", "vera", "mixed", "train"])
def test_a_forward_that_stopped_half_way_holds_nothing(recipe):
    """An exception (or the early stop of a recomputation) inside a block: no tensor of the graph stays in the model."""
    model = tower()
    adapted(model, recipe)
    out = logits(model, ids())

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.blocks[1].mlp.down.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids())
    handle.remove()
    assert torch.equal(logits(copy.deepcopy(model), ids()), out)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids()), out)
