"""Point 6: the effective weight is what anyone reads as `weight`, and `_parameters` always holds the base's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hostile import adapted, base_state, close, gradients, ids, logits, look, perturb, same_bits, tower
from torch import nn

import attunement as at


def encoder_layer(**fields):
    torch.manual_seed(1)
    options = {"dropout": 0.0, "batch_first": True, **fields}
    return nn.TransformerEncoderLayer(16, 2, 24, **options).eval()


def merged_twin(model, adapter, plain):
    """A model without the library that holds the merged weights."""
    adapter.merge()
    plain.load_state_dict(base_state(model))
    adapter.unmerge()
    return plain


SITES = ["linear1", "linear2", "self_attn.out_proj", "attention.{query,value}", "attention.qkv", "type:Linear"]


@pytest.mark.parametrize("method", [at.LoRA(rank=2), at.DoRA(rank=2), at.HRA(rank=2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("site", SITES)
def test_encoder_layer_in_eval_sees_every_weight(site, method):
    layer = encoder_layer()
    plain = copy.deepcopy(layer)
    x = torch.randn(3, 5, 16)
    with torch.inference_mode():
        bare = layer(x)
    adapter = perturb(at.adapt(layer, method, on=site), scale=0.3)
    with torch.inference_mode():
        fast = layer(x)
    with torch.no_grad():
        fast_again = layer(x)
    slow = layer(x).detach()
    assert not close(fast, bare, 1e-3), "the fast path went past the adapter"
    assert close(fast, slow, 1e-5)
    assert close(fast_again, slow, 1e-5)
    expected = merged_twin(layer, adapter, plain)
    with torch.no_grad():
        assert close(fast, expected.train()(x), 1e-5)
    at.use(layer, None)
    with torch.inference_mode():
        assert torch.equal(layer(x), bare)
    at.use(layer, "default")
    layer(x).pow(3).sum().backward()
    gradients(adapter)


@pytest.mark.parametrize("site", ["linear1", "linear2", "norm1", "norm2"])
@pytest.mark.parametrize("method", [at.Bottleneck(size=4), at.SSF()], ids=lambda m: type(m).__name__)
def test_output_forms_inside_an_encoder_layer_act_in_eval(site, method):
    layer = encoder_layer()
    seen = look(layer)
    x = torch.randn(3, 5, 16)
    with torch.inference_mode():
        bare = layer(x)
    adapter = perturb(at.adapt(layer, method, on=site), scale=0.3)
    with torch.inference_mode():
        fast = layer(x)
    assert not close(fast, bare, 1e-3), "the fast path went past the adapter"
    assert close(fast, layer(x).detach())
    at.use(layer, None)
    with torch.inference_mode():
        assert close(layer(x), bare, 1e-6)
    adapter.detach()
    assert look(layer) == seen
    with torch.inference_mode():
        assert torch.equal(layer(x), bare)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recipe", ["lora", "bottleneck", "ssf"])
def test_a_whole_encoder_with_nested_tensors(recipe, padded):
    """nn.TransformerEncoder reads its first layer's weights and turns padded batches into nested tensors."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True).eval()
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[0] * 5, [0] * 3 + [1] * 2, [0] * 4 + [1]]).bool() if padded else None
    with torch.inference_mode():
        bare = encoder(x, src_key_padding_mask=mask)
    recipes = {
        "lora": {"*.linear{1,2}": at.LoRA(rank=2), "attention.{query,output}": at.LoRA(rank=2)},
        "bottleneck": {"*.linear2": at.Bottleneck(size=4)},
        "ssf": {"*.linear1": at.SSF(), "*.norm{1,2}": at.SSF()},
    }
    perturb(at.adapt(encoder, recipes[recipe]), scale=0.3)
    keep = torch.ones(3, 5).bool() if mask is None else ~mask
    with torch.inference_mode():
        fast = encoder(x, src_key_padding_mask=mask)
    slow = encoder.train()(x, src_key_padding_mask=mask).detach()
    encoder.eval()
    assert close(fast[keep], slow[keep])
    assert not close(fast[keep], bare[keep], 1e-3)
    with at.using(encoder, None), torch.inference_mode():
        assert close(encoder(x, src_key_padding_mask=mask)[keep], bare[keep], 1e-6)


@pytest.mark.parametrize("fields", [{}, {"kdim": 12, "vdim": 10}, {"bias": False}, {"batch_first": False}])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(fields, training):
    options = {"batch_first": True, **fields}
    torch.manual_seed(1)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, **options)}).train(training)
    plain = copy.deepcopy(model)
    q = torch.randn(3, 5, 16)
    k, v = torch.randn(3, 5, fields.get("kdim", 16)), torch.randn(3, 5, fields.get("vdim", 16))

    def run(m):
        return m["attention"](q, k, v)[0].detach()

    bare = run(model)
    selections = ["attention.output"]
    selections += ["attention.{query,value}"] if "kdim" not in fields else []
    for selection in selections:
        adapter = perturb(at.adapt(model, at.LoRA(rank=2), on=selection), scale=0.3)
        out = run(model)
        assert not close(out, bare, 1e-3)
        assert close(out, run(merged_twin(model, adapter, plain)))
        adapter.detach()
        assert torch.equal(run(model), bare)


@pytest.mark.parametrize("site", ["attention.output", "attention.qkv", "attention.query", "attention.out_proj"])
def test_output_forms_refuse_both_matrices_of_multihead_attention(site):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)})
    seen = look(model)
    with pytest.raises(at.AttunementError):
        at.adapt(model, at.Bottleneck(size=4), on=site)
    assert look(model) == seen


def test_a_bottleneck_on_the_whole_of_multihead_attention():
    """Its output is a tuple; the sublayer's output is the first of it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)}).eval()
    x = torch.randn(3, 5, 16)
    bare, weights = (t.detach() for t in model["attention"](x, x, x))
    perturb(at.adapt(model, at.Bottleneck(size=4), on="attention"), scale=0.3)
    out, same_weights = (t.detach() for t in model["attention"](x, x, x))
    assert not close(out, bare, 1e-3)
    assert torch.equal(weights, same_weights)


class ReadsWeights(nn.Module):
    """A parent that never calls its child."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return F.linear(x, self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("method", [at.LoRA(rank=2), at.DoRA(rank=2), at.HRA(rank=2), at.SVFit()])
def test_a_parent_that_reads_the_weight(method):
    torch.manual_seed(1)
    model = ReadsWeights()
    x = torch.randn(3, 16)
    bare = model(x).detach()
    adapter = perturb(at.adapt(model, {"linear": method}), scale=0.3)
    out = model(x)
    assert not close(out.detach(), bare, 1e-3)
    assert close(model.linear(x).detach(), out.detach())
    out.pow(3).sum().backward()
    gradients(adapter)
    adapter.merge()
    assert close(model(x).detach(), out.detach())
    assert model.linear.weight is model.linear._parameters["weight"]
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(x), bare)


@pytest.mark.parametrize("recipe", ["lora", "dora", "hra", "svfit", "train", "ssf"])
def test_parameters_hold_the_base_before_during_and_after_forward(recipe):
    model = tower()
    seen = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    adapted(model, recipe)
    checks = []

    def check(module, *_):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = names[id(module)] + key
                if name in seen:
                    checks.append(seen[name][0] == id(parameter) and torch.equal(seen[name][1], parameter))

    names = {id(m): f"{name}." if name else "" for name, m in model.named_modules()}
    for module in model.modules():
        module.register_forward_pre_hook(check)
        module.register_forward_hook(check)
    model(ids()).sum().backward()
    assert len(checks) > 40
    assert all(checks)
    assert {name for name, p in model.named_parameters() if id(p) in {i for i, _ in seen.values()}} == set(seen)


def test_assigning_a_weight_after_adapt():
    """`module.weight = Parameter(...)` is what tie_weights and resize do; the property must not swallow it."""
    model = tower()
    adapter = perturb(at.adapt(model, {"*.query": at.LoRA(rank=2)}))
    query = model.blocks[0].attention.query
    new = nn.Parameter(torch.randn(16, 16), requires_grad=False)
    query.weight = new
    assert query._parameters["weight"] is new
    assert "weight" not in vars(query)
    x = torch.randn(2, 16)
    expected = F.linear(x, new, query.bias) + (query(x) - F.linear(x, new, query.bias))
    assert close(query(x), expected)
    with at.using(model, None):
        assert torch.equal(query(x), F.linear(x, new, query.bias))
        assert query.weight is new
    adapter.detach()
    assert query.weight is new
    assert torch.equal(query(x), F.linear(x, new, query.bias))


def test_a_bias_may_still_be_none_or_replaced():
    model = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False)})
    adapter = perturb(at.adapt(model, {"a": at.SSF()}), scale=0.3)
    x = torch.randn(2, 16)
    out = model["a"](x).detach()
    before = sorted(model.state_dict())
    adapter.merge()
    assert close(model["a"](x).detach(), out)
    assert model["a"].bias is not None, "a shift has to go somewhere"
    adapter.unmerge()
    assert model["a"]._parameters["bias"] is None
    assert sorted(model.state_dict()) == before
    assert torch.equal(model["a"](x), out)


def test_parametrized_modules_are_adapted_or_refused():
    """torch's own parametrizations exchange the class too, and keep the weight elsewhere."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"conv": torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))})
    x = torch.randn(2, 4, 9)
    bare, seen = model["conv"](x).detach(), look(model)
    try:
        adapter = perturb(at.adapt(model, at.LoRA(rank=2), on="conv"), scale=0.3)
    except at.AttunementError:
        assert look(model) == seen
        assert torch.equal(model["conv"](x), bare)
        return
    out = model["conv"](x).detach()
    assert not close(out, bare, 1e-3)
    adapter.detach()
    assert look(model) == seen
    assert torch.equal(model["conv"](x), bare)


def test_modules_with_flat_weights_are_refused_by_name():
    """nn.LSTM hands its weights to one fused call: nothing can stand in for them."""
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "inner": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    seen = look(model)
    with pytest.raises(at.AttunementError, match="lstm"):
        at.adapt(model, at.LoRA(rank=2), on="lstm")
    assert look(model) == seen
    at.adapt(model, at.LoRA(rank=2), on="*")
    assert [key for key in model.state_dict() if "attuned" in key and "lstm" in key] == []


def test_a_module_used_twice_is_adapted_once():
    torch.manual_seed(1)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    plain = copy.deepcopy(model)
    adapter = perturb(at.adapt(model, at.LoRA(rank=2), on="type:Linear"), scale=0.3)
    assert len(list(adapter.parameters())) == 2
    x = torch.randn(2, 16)
    out = model(x).detach()
    adapter.merge()
    plain[0].load_state_dict({k: v for k, v in model[0].state_dict().items() if "attuned" not in k})
    assert close(model(x).detach(), out)
    assert close(plain(x).detach(), out)
    adapter.unmerge()
    adapter.detach()
    assert type(shared) is nn.Linear


@pytest.mark.parametrize("recipe", ["lora", "dora", "hra", "svfit", "ssf", "ia3", "train", "vera"])
def test_merge_equals_forward_and_unmerge_is_bit_exact(recipe):
    model = tower(torch.float64)
    state = base_state(model)
    adapter = adapted(model, recipe)
    out = logits(model, ids())
    adapter.merge()
    assert close(logits(model, ids()), out, 1e-10)
    assert not same_bits(base_state(model), state)
    adapter.unmerge()
    assert same_bits(base_state(model), state)
    assert torch.equal(logits(model, ids()), out)


def test_all_adapters_come_off_in_whatever_order_they_were_merged():
    model = tower(torch.float64)
    state = base_state(model)
    adapters = [
        perturb(at.adapt(model, at.LoRA(rank=2), on="attention", name=name), seed) for seed, name in enumerate("xyz")
    ]
    for index in (1, 2, 0):
        adapters[index].merge()
    at.detach(model)
    assert same_bits(model.state_dict(), state)
