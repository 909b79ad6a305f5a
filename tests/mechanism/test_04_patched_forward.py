"""Point 4: a forward in the instance hides the class's; accelerate's is carried, a stranger's is refused."""

import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hostile import QUERY_VALUE, adapted, base_state, close, ids, logits, look, perturb, same_bits, tower

import attunement as at


class Counting(ModelHook):
    """A hook of accelerate's that also changes what it is given, so that its loss would be seen."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def hook_all(model):
    hooks = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            hooks.append(Counting())
            add_hook_to_module(module, hooks[-1])
    return hooks


RECIPE = ["lora", "dora", "bottleneck", "ssf", "mixed"]


@pytest.mark.parametrize("recipe", RECIPE)
def test_hooks_of_accelerate_before_adapt(recipe):
    plain = tower()
    adapted(plain, recipe)
    model = tower()
    hooks = hook_all(model)
    bare = logits(model, ids())
    adapted(model, recipe)
    calls = [hook.calls for hook in hooks]
    assert torch.equal(logits(model, ids()), logits(plain, ids()))
    assert [hook.calls - before for hook, before in zip(hooks, calls, strict=True)] == [1] * len(hooks)
    for module in model.modules():
        remove_hook_from_module(module)
    assert torch.equal(logits(model, ids()), logits(plain, ids())), "removing the hook removed the adapter"
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)
    assert type(model.blocks[0].attention.query) is torch.nn.Linear


@pytest.mark.parametrize("recipe", RECIPE)
def test_hooks_of_accelerate_after_adapt(recipe):
    plain = tower()
    bare = logits(plain, ids())
    adapted(plain, recipe)
    model = tower()
    adapted(model, recipe)
    hooks = hook_all(model)
    assert torch.equal(logits(model, ids()), logits(plain, ids()))
    assert all(hook.calls == 1 for hook in hooks)
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)
    assert all(hook.calls == 2 for hook in hooks), "detach lost accelerate's hooks"
    for module in model.modules():
        remove_hook_from_module(module)
    assert torch.equal(logits(model, ids()), bare)
    assert type(model.blocks[0].attention.query) is torch.nn.Linear


def test_detach_with_the_hooks_still_there_restores_accelerates_own_state():
    model = tower()
    hook_all(model)
    bare = logits(model, ids())
    seen = look(model)
    adapted(model, "mixed").detach()
    assert look(model) == seen
    assert torch.equal(logits(model, ids()), bare)
    for module in model.modules():
        remove_hook_from_module(module)
    assert torch.equal(logits(model, ids()), bare)


def test_what_accelerate_leaves_behind_is_not_a_strangers():
    """remove_hook_from_module puts the class's own forward into the instance."""
    plain = tower()
    adapted(plain, "mixed")
    model = tower()
    hook_all(model)
    for module in model.modules():
        remove_hook_from_module(module)
    assert "forward" in vars(model.blocks[0].attention.query)
    bare = logits(model, ids())
    adapted(model, "mixed")
    assert torch.equal(logits(model, ids()), logits(plain, ids()))
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)


def test_a_dispatched_model_is_adapted():
    from accelerate import dispatch_model

    plain = tower()
    adapted(plain, "lora")
    model = dispatch_model(tower(), device_map={"": "cpu"}, force_hooks=True)
    adapted(model, "lora")
    assert torch.equal(logits(model, ids()), logits(plain, ids()))


def test_offloaded_weights_are_used_or_refused():
    """Under offload the base stands on the meta device between calls."""
    from accelerate import cpu_offload

    plain = tower()
    adapted(plain, "lora")
    model = cpu_offload(tower(), execution_device=torch.device("cpu"))
    assert model.blocks[0].attention.query.weight.is_meta
    refusal = ""
    try:
        adapter = at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2), "*.mlp.{up,down}": at.LoRA(rank=3, alpha=5)})
    except at.AttunementError as error:
        refusal = str(error)
    if refusal:
        assert "meta" in refusal or "offload" in refusal
        return
    perturb(adapter)
    assert not any(p.is_meta for p in adapter.parameters())
    adapter.load_state({key: value.clone() for key, value in at.adapters(plain)["default"].state().items()})
    assert close(logits(model, ids()), logits(plain, ids()))


@pytest.mark.parametrize("site", ["blocks.0.attention.query", "blocks.1.mlp.down"])
def test_a_strangers_forward_is_refused_before_anything_changes(site):
    model = tower()
    patched = model.get_submodule(site)
    patched.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight) * 0, patched)
    seen, state = look(model), base_state(model)
    for recipe in ({"*.attention.query|*.mlp.down": at.LoRA(rank=2)}, {site: at.SSF()}):
        with pytest.raises(at.AttunementError, match=site.replace(".", r"\.")):
            at.adapt(model, recipe)
        assert look(model) == seen
        assert same_bits(base_state(model), state)
        assert at.adapters(model) == {}


def test_a_strangers_forward_elsewhere_is_no_reason_to_refuse():
    model = tower()
    other = model.norm
    other.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), other)
    bare = logits(model, ids())
    adapted(model, "lora")
    assert not torch.equal(logits(model, ids()), bare)


def test_a_refusal_at_the_last_site_changes_nothing():
    """Validation comes before mutation: the first of many sites is as untouched as the refused one."""
    model = tower()
    seen, keys = look(model), list(model.state_dict())
    with pytest.raises(at.AttunementError):
        at.adapt(model, {"*.attention.query": at.LoRA(rank=2), "blocks.1.mlp.down": at.LoRA(rank=999)})
    with pytest.raises(at.AttunementError):
        at.adapt(model, {"*.attention.query": at.LoRA(rank=2), "*.attention.qeury": at.LoRA(rank=2)})
    assert look(model) == seen
    assert list(model.state_dict()) == keys
    adapted(model, "lora", "a")
    seen, keys, out = look(model), list(model.state_dict()), logits(model, ids())
    for wrong in (
        {"*.attention.query": at.LoRA(rank=2), "blocks.1.mlp.down": at.LoRA(rank=999)},
        {"nowhere": at.SSF()},
    ):
        with pytest.raises(at.AttunementError):
            at.adapt(model, wrong, name="b")
    assert look(model) == seen
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids()), out)
    assert list(at.adapters(model)) == ["a"]
