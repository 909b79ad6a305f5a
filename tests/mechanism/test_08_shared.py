"""Point 8: tensors that several sites share are registered once."""

import copy
import pickle
import warnings

import pytest
import torch
from hostile import adapter_keys, bert, close, gradients, ids, logits, perturb, tower

import attunement as at


def shared(model, name="default", seed=0, **fields):
    return perturb(at.adapt(model, {"*.mlp.{up,down}": at.VeRA(rank=4, **fields)}, name=name), seed)


def storages(model):
    """Every stored tensor once per key, the empty ones aside."""
    return [(k, v.untyped_storage().data_ptr()) for k, v in model.state_dict().items() if v.numel()]


def test_registered_once():
    model = tower()
    shared(model)
    pointers = [pointer for _, pointer in storages(model)]
    assert len(pointers) == len(set(pointers))
    tensors = [t for _, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    assert len({id(t) for t in tensors}) == len(tensors)


def test_four_unlike_sites_use_one_pair():
    """Eight VeRA sites hold vectors only; the wide pair appears once, so it does not grow with the sites."""
    few, many = tower(), tower()
    at.adapt(few, {"blocks.0.mlp.{up,down}": at.VeRA(rank=4)})
    at.adapt(many, {"*.mlp.{up,down}": at.VeRA(rank=4)})

    def wide(model):
        return sum(v.numel() for k, v in model.state_dict().items() if "attuned" in k and v.dim() > 1)

    assert wide(few) == wide(many)


def test_save_pretrained_and_safetensors_take_it(tmp_path):
    from safetensors.torch import save_model

    model = bert()
    perturb(at.adapt(model, {"mlp.{up,down}": at.VeRA(rank=4)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "whole.safetensors"))


def test_stays_shared_and_apart_after_a_copy():
    model = tower()
    shared(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids()), logits(model, ids()))
        pointers = [pointer for _, pointer in storages(other)]
        assert len(pointers) == len(set(pointers))
        assert not set(pointers) & {pointer for _, pointer in storages(model)}


def test_a_block_called_alone_sees_the_shared_tensors():
    """Feature extraction, pipeline stages and checkpointing call a block without the root."""
    model = tower()
    shared(model)
    seen = {}
    handle = model.blocks[1].register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o))
    logits(model, ids())
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.blocks[1](seen["x"]), seen["y"])
        assert torch.equal(model.blocks[1].mlp.up(torch.ones(1, 16)), model.blocks[1].mlp.up(torch.ones(1, 16)))
        perturb(at.adapters(model)["default"], seed=9)
        alone = model.blocks[1](seen["x"])
    assert not torch.equal(alone, seen["y"]), "the block used a value left over from an earlier call"


def test_a_submodule_adapted_and_called_through_the_whole_and_alone():
    model = bert("BertForSequenceClassification")
    perturb(at.adapt(model.bert, {"mlp.{up,down}": at.VeRA(rank=4)}))
    alone = model.bert(ids()).last_hidden_state.detach()
    seen = {}
    model.bert.register_forward_hook(lambda m, i, o: seen.update(y=o.last_hidden_state))
    model(ids())
    assert torch.equal(seen["y"], alone)


def test_two_adapters_with_other_seeds_have_other_pairs():
    model = tower()
    shared(model, "a")
    first = logits(model, ids())
    shared(model, "b")
    second = logits(model, ids())
    at.use(model, "a")
    assert torch.equal(logits(model, ids()), first)
    at.detach(model, "a")
    at.use(model, "b")
    assert torch.equal(logits(model, ids()), second)
    assert adapter_keys(model, "b")
    assert not adapter_keys(model, "a")


def test_gradients_of_shared_and_own_tensors_and_their_saving(tmp_path):
    model, other = tower(), tower()
    adapter = shared(model)
    model(ids()).pow(3).sum().backward()
    gradients(adapter)
    adapter.save(tmp_path / "vera")
    at.load(other, tmp_path / "vera")
    assert torch.equal(logits(other, ids()), logits(model, ids()))
    size = (tmp_path / "vera" / "adapter.safetensors").stat().st_size
    own = sum(p.numel() * 4 for p in adapter.parameters())
    assert size < own + 4000, "the seeded pair was stored"


@pytest.mark.parametrize("combination", [at.Sum("a", "b"), at.Rows(["a", "b", None])], ids=["sum", "rows"])
def test_in_a_combination(combination):
    model = tower()
    bare = logits(model, ids())
    outs = {}
    for i, name in enumerate("ab"):
        shared(model, name, seed=i)
        outs[name] = logits(model, ids())
    at.use(model, combination)
    out = logits(model, ids())
    if isinstance(combination, at.Rows):
        expected = torch.stack([outs["a"][0], outs["b"][1], bare[2]])
        assert close(out, expected)
    else:
        assert not close(out, outs["a"], 1e-4)
        assert not close(out, outs["b"], 1e-4)
