"""Point 18: a tensor is read through the module that owns it, at the moment it is used.

ZeRO-3 keeps parameters empty and fills them when their own module runs or is read. The stand-in below does that to
every parameter, the base's and the adapter's, so that a value taken at any other time is empty and fails loudly.
"""

from collections import OrderedDict

import pytest
import torch
from hostile import RECIPES, adapted, bert, close, gradients, ids, logits, mixture, perturb, tower
from torch import nn

import attunement as at


class Gathering(OrderedDict):
    """A module's `_parameters`: filled on reading an item, as DeepSpeed's ZeROOrderedDict does."""

    def __init__(self, parameters, zero):
        super().__init__(parameters)
        self.zero = zero

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        if parameter is not None:
            self.zero.fill(parameter)
        return parameter


class Zero:
    """Empties every parameter when the module that made it appear has run."""

    def __init__(self, model):
        self.whole = {id(p): p.data for p in model.parameters()}
        self.parameters = list(model.parameters())
        self.running = []  # a stack of what each running module has filled
        self.reads = 0
        for module in model.modules():
            module._parameters = Gathering(dict(module._parameters), self)
            module.register_forward_pre_hook(self.before)
            module.register_forward_hook(self.after)
        self.empty()

    def fill(self, parameter):
        if self.running and parameter.numel() == 0:
            self.reads += 1
            parameter.data = self.whole[id(parameter)]
            self.running[-1].append(parameter)

    def before(self, module, *_):
        self.running.append([])
        for name in module._parameters:
            module._parameters[name]

    def after(self, *_):
        for parameter in self.running.pop():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def empty(self):
        for parameter in self.parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def restore(self):
        for parameter in self.parameters:
            parameter.data = self.whole[id(parameter)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_backward_with_gathered_parameters(recipe):
    model = tower()
    adapter = adapted(model, recipe)
    out = model(ids())
    out.pow(3).sum().backward()
    expected = gradients(adapter)
    for p in adapter.parameters():
        p.grad = None
    zero = Zero(model)
    with torch.no_grad():
        assert close(model(ids()), out.detach())
        assert close(model(ids()), out.detach()), "something kept a tensor of the first forward"
    assert zero.reads
    loss = model(ids()).pow(3).sum()
    zero.restore()
    loss.backward()
    assert all(close(value, expected[key], 1e-5) for key, value in gradients(adapter).items())


@pytest.mark.parametrize("what", [at.Sum("a", "b"), at.Stack("a", "b"), at.Rows(["a", "b", None])])
def test_combinations_with_gathered_parameters(what):
    model = tower()
    adapted(model, "lora", "a")
    adapted(model, "lora", "b", seed=1)
    at.use(model, what)
    out = logits(model, ids())
    Zero(model)
    assert close(logits(model, ids()), out)
    assert close(logits(model, ids()), out)


def test_multihead_attention_and_experts_with_gathered_parameters():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    perturb(at.adapt(layer, {"attention.{query,output}": at.LoRA(rank=2), "linear2": at.Bottleneck(size=3)}))
    x = torch.randn(2, 5, 16)
    out = layer(x).detach()
    Zero(layer)
    with torch.no_grad():
        assert close(layer(x), out)
    experts = mixture("mixtral")
    perturb(at.adapt(experts, {"experts.{gate,up,down}": at.LoRA(rank=2)}), scale=0.3)
    expected = logits(experts, ids())
    Zero(experts)
    assert close(logits(experts, ids()), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_objects_in_every_module_are_followed(recipe):
    """Every parameter and every buffer replaced in its module, as FSDP2 does: the output is that of the new ones."""
    model, other = tower(), tower()
    adapted(model, recipe)
    adapted(other, recipe, seed=1)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    logits(model, ids())
    theirs = dict(other.named_modules())
    for name, module in model.named_modules():
        for key in module._parameters:
            new = theirs[name]._parameters[key]
            if new is not None:
                module._parameters[key] = nn.Parameter(new.detach().clone(), requires_grad=new.requires_grad)
        for key in module._buffers:
            module._buffers[key] = theirs[name]._buffers[key].clone()
    assert torch.equal(logits(model, ids()), logits(other, ids()))
    model(ids()).pow(3).sum().backward()
    gradients(at.adapters(model)["default"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_module_keeps_a_tensor_in_a_plain_attribute(recipe):
    """A tensor outside `_parameters` and `_buffers` is seen by neither `to`, FSDP nor ZeRO."""
    model = tower()
    adapted(model, recipe)
    model(ids()).pow(3).sum().backward()
    logits(model, ids())
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def tensors(value, depth=0):
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, nn.Module):
            return
        elif isinstance(value, dict) and depth < 4:
            for item in value.values():
                yield from tensors(item, depth + 1)
        elif isinstance(value, list | tuple) and depth < 4:
            for item in value:
                yield from tensors(item, depth + 1)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("attunement") and depth < 4:
            yield from tensors(vars(value), depth + 1)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            kept = [t for t in tensors(value) if t.untyped_storage().data_ptr() in own and t.numel()]
            assert not kept, f"{name or 'the model'} keeps {len(kept)} tensors in {key}"


def test_devices_and_types_follow_every_cast_of_the_tree():
    model = bert()
    perturb(at.adapt(model, {"attention.*": at.LoRA(rank=2), "mlp": at.Bottleneck(size=3), "norm": at.Train()}))
    calls = []
    model._apply(lambda t: calls.append(1) or t)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(calls) >= len(tensors)
