"""Point 1: the exchanged class is indistinguishable from the class it stands for."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from hostile import (
    QUERY_VALUE,
    RECIPES,
    adapted,
    base_state,
    bert,
    close,
    gradients,
    ids,
    llama,
    logits,
    look,
    perturb,
    same_bits,
    tower,
)
from torch import nn

import attunement as at


@pytest.mark.parametrize("recipe", RECIPES)
def test_names_signatures_and_isinstance_stay(recipe):
    model = tower()
    before = {name: type(module) for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    adapted(model, recipe)
    exchanged = 0
    for name, original in before.items():
        module = model.get_submodule(name)
        assert module is modules[name]
        assert isinstance(module, original)
        exchanged += type(module) is not original
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(module), attribute) == getattr(original, attribute)
        assert inspect.signature(type(module).forward) == inspect.signature(original.forward)
        assert inspect.signature(module.forward) == inspect.signature(original.forward.__get__(module))
    assert exchanged, "no class was exchanged: how does the adapter act?"
    now = dict(model.named_parameters())
    for name, parameter in parameters.items():
        assert now[name] is parameter, f"{name} is another object after adapt"


@pytest.mark.parametrize("recipe", RECIPES)
def test_base_keys_stay_and_adapter_keys_stand_beside_them(recipe):
    model = tower()
    before = base_state(model)
    adapted(model, recipe, name="mine")
    assert same_bits(base_state(model), before)
    beside = [key for key in model.state_dict() if key not in before]
    assert beside
    assert all(".attuned.mine." in f".{key}" for key in beside)


@pytest.mark.parametrize("recipe", RECIPES)
def test_detach_leaves_no_trace(recipe):
    model = tower()
    model.blocks[0].mlp.up.weight.requires_grad_(False)  # a choice of the user's that has to come back
    given, seen, state, out = ids(), look(model), base_state(model), logits(model, ids())
    first, second = adapted(model, recipe, "first"), adapted(model, recipe, "second", seed=1)
    with at.using(model, at.Sum("first", "second")):
        assert not torch.equal(logits(model, given), out)
    first.detach()
    assert list(at.adapters(model)) == ["second"]
    second.detach()
    assert at.adapters(model) == {}
    assert look(model) == seen
    assert same_bits(model.state_dict(), state)
    assert torch.equal(logits(model, given), out)


def test_detach_of_a_model_in_train_mode_and_by_name():
    model = tower().train()
    seen = look(model)
    adapted(model, "mixed", "a")
    adapted(model, "lora", "b")
    at.detach(model, "a")
    assert list(at.adapters(model)) == ["b"]
    at.detach(model)
    assert look(model) == seen


def test_classes_are_cached_and_do_not_pile_up():
    model = tower()
    adapted(model, "mixed").detach()
    gc.collect()
    before = len(nn.Linear.__subclasses__())
    kinds = set()
    for _ in range(10):
        adapter = adapted(model, "mixed")
        kinds.add(type(model.blocks[0].attention.query))
        adapter.detach()
    gc.collect()
    assert len(nn.Linear.__subclasses__()) == before
    assert len(kinds) == 1


def test_save_pretrained_writes_the_architecture_and_outputs_are_still_recorded(tmp_path):
    import json

    model = bert("BertForSequenceClassification")
    perturb(at.adapt(model, {"attention.{query,value}": at.LoRA(rank=2), "attention|mlp": at.Bottleneck(size=4)}))
    out = model(ids(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    eager = bert(attn_implementation="eager")
    at.adapt(eager, {"attention|mlp": at.Bottleneck(size=4)})
    assert len(eager(ids(), output_attentions=True).attentions) == 2
    with pytest.warns(UserWarning, match="save"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def test_outputs_are_recorded_from_an_exchanged_block():
    """transformers finds the layers to record by their class."""
    model = llama()
    hidden = model(ids(), output_hidden_states=True).hidden_states
    at.adapt(model, {"norm": at.Train(), "attention|mlp": at.Bottleneck(size=4)})
    adapted_hidden = model(ids(), output_hidden_states=True).hidden_states
    assert len(adapted_hidden) == len(hidden) == 3


def test_trainer_finds_the_arguments_of_an_adapted_root(tmp_path):
    import transformers
    from transformers.utils import find_labels

    model = bert("BertForSequenceClassification")
    at.adapt(model, {"*": at.LoRA(rank=2), "norm": at.Train()})
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=args)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    assert find_labels(type(model)) == ["labels"]
    assert trainer.label_names == ["labels"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_adapted_and_independent(recipe, how, tmp_path):
    model = tower()
    bare = logits(model, ids())
    adapter = adapted(model, recipe, "a")
    adapted(model, recipe, "b", seed=1)
    at.use(model, "a")
    out = logits(model, ids())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(other, ids()), out)
    assert list(at.adapters(other)) == ["a", "b"]
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == wanted

    perturb(at.adapters(other)["a"], seed=5)  # the copy moves, the original does not
    assert not torch.equal(logits(other, ids()), out)
    assert torch.equal(logits(model, ids()), out)
    at.use(other, None)
    assert torch.equal(logits(other, ids()), bare)
    assert torch.equal(logits(model, ids()), out)
    perturb(adapter, seed=6)
    at.use(other, "b")
    second = logits(other, ids())
    at.use(model, "b")
    assert torch.equal(logits(model, ids()), second)

    at.detach(other)
    assert torch.equal(logits(other, ids()), bare)
    assert type(other.blocks[0].attention.query) is nn.Linear
    assert len(at.adapters(model)) == 2


def test_a_copy_of_one_adapted_module_works_alone():
    model = tower()
    adapted(model, "lora")
    block = model.blocks[0]
    x = torch.randn(2, 5, 16)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    query = copy.deepcopy(block.attention.query)
    assert torch.equal(query(x), block.attention.query(x))


def test_a_pickle_opens_in_a_process_that_has_not_imported_the_library(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    perturb(at.adapt(model, at.LoRA(rank=2), on="type:Linear"))
    x = torch.randn(2, 6)
    torch.save({"model": model, "x": x, "y": model(x).detach()}, tmp_path / "m.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); d = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(d['model'](d['x']), d['y']); assert type(d['model'][0]).__name__ == 'Linear'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiles_in_one_graph(recipe, fresh_compiler):
    model = tower(blocks=1)
    adapter = adapted(model, recipe)
    eager = model(ids())
    eager.pow(3).sum().backward()
    expected = gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(ids())
    out.pow(3).sum().backward()
    assert close(out, eager)
    assert all(close(value, expected[name], 1e-4) for name, value in gradients(adapter).items())


def test_adapt_of_a_submodule_keeps_its_state_there():
    model = bert("BertForSequenceClassification")
    before = set(model.state_dict())
    adapter = perturb(at.adapt(model.bert, {"attention.{query,value}": at.LoRA(rank=2)}, name="inner"))
    assert list(at.adapters(model.bert)) == ["inner"]
    assert all(key.startswith("bert.") for key in set(model.state_dict()) - before)
    out = logits(model, ids())
    with at.using(model.bert, None):
        assert not torch.equal(logits(model, ids()), out)
    adapter.detach()
    assert set(model.state_dict()) == before


def test_a_subclass_with_its_own_tricks():
    """A class with __slots__-like state, a metaclass-free __getattr__ and a forward with keywords only."""

    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.calls = 0

        def forward(self, input, *, gain: float = 1.0):
            self.calls += 1
            return gain * super().forward(input)

    model = nn.ModuleDict({"odd": Odd()})
    seen = look(model)
    x = torch.randn(2, 16)
    bare = model["odd"](x, gain=2.0)
    adapter = perturb(at.adapt(model, {"odd": at.LoRA(rank=2)}))
    out = model["odd"](x, gain=2.0)
    assert model["odd"].calls == 2
    assert not torch.equal(out, bare)
    adapter.merge()
    assert close(model["odd"](x, gain=2.0), out)
    adapter.unmerge()
    adapter.detach()
    assert look(model) == seen
    assert torch.equal(model["odd"](x, gain=2.0), bare)


def test_query_value_globs_reach_every_site():
    model = tower()
    at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2)})
    keys = [key for key in model.state_dict() if ".attuned." in key and key.endswith(".A")]
    assert len(keys) == 4
    assert "blocks.0.attention.query.attuned.default.weight.A" in keys


@pytest.mark.parametrize("method", [at.LoRA(rank=2), at.VeRA(rank=2), at.SSF()], ids=lambda m: type(m).__name__)
def test_containers_that_iterate_over_their_children(method):
    """nn.Sequential runs and counts every child it has: what an adapter adds must not be among them."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6))
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(2, 6)
    bare = model(x).detach()
    perturb(at.adapt(model, {"type:Linear": method}))
    out = model(x).detach()
    assert not close(out, bare, 1e-3)
    assert len(model) == 3
    assert len(inner) == 3
    assert [type(m) for m in model.children()][:1] == [nn.Sequential]
    assert close(nn.Sequential(*model)(x).detach(), out)
    assert close(model[:2](x), inner(x).relu())
    assert model[-1] is model[2]
    listed = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    perturb(at.adapt(listed, {"*": method}))
    assert len(listed) == 2
    assert [type(m).__name__ for m in listed] == ["Linear", "Linear"]
    named = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    perturb(at.adapt(named, {"*": method}))
    assert list(named) == ["a", "b"]
    assert len(list(named.values())) == 2


@pytest.mark.parametrize("what", [at.Sum("a", "b"), at.Stack("a", "b"), at.Rows(["a", "b", None]), None], ids=str)
def test_a_copy_keeps_the_active_set(what):
    model = tower()
    adapted(model, "lora", "a")
    adapted(model, "lora", "b", seed=1)
    at.use(model, what)
    out = logits(model, ids())
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids()), out)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids()), out)
    perturb(at.adapters(other)["a"], seed=3)
    if what is not None:
        assert not torch.equal(logits(other, ids()), out)
    assert torch.equal(logits(model, ids()), out)


@pytest.mark.parametrize("recipe", ["lora", "dora", "svfit", "ssf", "train"])
def test_a_copy_of_a_merged_model_unmerges_alone(recipe):
    model = tower()
    state = base_state(model)
    adapter = adapted(model, recipe)
    objects = {name: id(p) for name, p in model.named_parameters()}
    out = logits(model, ids())
    adapter.merge()
    assert {name: id(p) for name, p in model.named_parameters()} == objects, "a merge writes into the same objects"
    merged = base_state(model)
    other = copy.deepcopy(model)
    assert close(logits(other, ids()), out)
    at.adapters(other)["default"].unmerge()
    assert same_bits(base_state(other), state)
    assert same_bits(base_state(model), merged)
    adapter.detach()
    assert same_bits(model.state_dict(), state)


def test_a_root_that_is_itself_the_site(tmp_path):
    torch.manual_seed(3)
    model = nn.Linear(6, 8)
    seen, x = look(model), torch.randn(2, 6)
    bare = model(x).detach()
    adapter = perturb(at.adapt(model, at.LoRA(rank=2), on="*"))
    assert "attuned.default.weight.A" in model.state_dict()
    out = model(x).detach()
    assert not close(out, bare, 1e-3)
    assert close(model(input=x).detach(), out)
    assert torch.equal(copy.deepcopy(model)(x), out)
    adapter.save(tmp_path / "one")
    adapter.merge()
    assert close(model(x).detach(), out)
    adapter.unmerge()
    adapter.detach()
    assert look(model) == seen
    at.load(model, tmp_path / "one")
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_inside_inference_mode(recipe):
    """A server may load and run under one `inference_mode`, and look at gradients later."""
    plain = tower()
    adapted(plain, recipe)
    expected = logits(plain, ids())
    model = tower()
    with torch.inference_mode():
        adapted(model, recipe)
        assert close(model(ids()), expected)
        with at.using(model, at.Rows(["default", None, "default"])):
            rows = model(ids())
        at.use(model, None)
        bare = model(ids())
    assert close(rows[0], expected[0])
    assert close(rows[1], bare[1])


def test_what_inference_mode_left_behind_does_not_stop_gradients():
    model = tower()
    adapted(model, "lora", "a").trainable = False
    adapted(model, "lora", "b", seed=1).trainable = False
    for what in (at.Rows(["a", "b", None]), at.Sum("a", "b"), "a"):
        at.use(model, what)
        with torch.inference_mode():
            model(ids())
        x = start = model.embedding(ids()).detach().requires_grad_()
        for block in model.blocks:
            x = block(x)
        (grad,) = torch.autograd.grad(x.pow(3).sum(), start)
        assert grad.abs().sum() > 0
