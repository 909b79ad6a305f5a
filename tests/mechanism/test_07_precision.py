"""Point 7: adapters in float32 are cast at use; the activation is never copied to their type."""

import pytest
import torch
from hostile import QUERY_VALUE, RECIPES, adapted, gradients, ids, logits, perturb, tower
from torch import nn

import attunement as at


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_types_of_tensors_and_of_outputs(recipe, base):
    model = tower(base)
    adapter = adapted(model, recipe)
    expected = torch.float64 if base == torch.float64 else torch.float32
    assert {p.dtype for p in adapter.parameters()} == {expected}
    inner = {}
    for name, module in model.named_modules():
        if not name or ".attuned" in name or not isinstance(module, nn.Linear | nn.LayerNorm):
            continue
        module.register_forward_hook(lambda m, i, o, name=name: inner.__setitem__(name, (i[0].dtype, o.dtype)))
    out = model(ids())
    assert out.dtype == base
    assert set(inner.values()) == {(base, base)}
    out.float().pow(3).sum().backward()
    assert {g.dtype for g in gradients(adapter).values()} == {expected}


@pytest.mark.parametrize("method", [at.LoRA(rank=2), at.VeRA(rank=4), at.HRA(rank=2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_no_float32_copy_of_the_activation_is_saved(method, base):
    model = tower(base)
    at.adapt(model, {"*.attention.{query,key,value}": method})
    given = ids(batch=4, tokens=50)
    size = 4 * 50 * 16
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t):
        model(given)
    wide = [entry for entry in saved if entry[0] == torch.float32 and entry[1] >= size]
    base_wide = []
    bare = tower(base)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: base_wide.append((t.dtype, t.numel())) or t, lambda t: t)
    with hooks:
        bare(given)
    base_wide = [entry for entry in base_wide if entry[0] == torch.float32 and entry[1] >= size]
    assert len(wide) <= len(base_wide), f"{len(wide)} saved tensors of x's size in float32"


def test_one_saved_activation_for_query_key_and_value():
    """Three LoRAs on one input keep x once, by storage, and never in a second type."""
    model = tower(torch.bfloat16)
    at.adapt(model, {"*.attention.{query,key,value}": at.LoRA(rank=2)})
    attention, x = model.blocks[0].attention, torch.randn(4, 50, 16, dtype=torch.bfloat16)
    stores = {}

    def keep(tensor):
        if tensor.numel() >= x.numel():
            stores[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        q, k, v = attention.query(x), attention.key(x), attention.value(x)
    assert list(stores) == [x.untyped_storage().data_ptr()]
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_keeps_the_bases_types(recipe):
    model = tower()

    def types():
        found = []
        linears = [
            m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm) and "attuned" not in n
        ]
        handles = [m.register_forward_hook(lambda m, i, o: found.append(o.dtype)) for m in linears]
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids())
        for handle in handles:
            handle.remove()
        return [*found, out.dtype], out

    bare, _ = types()
    exact = adapted(model, recipe) and logits(model, ids())
    now, out = types()
    assert now == bare
    assert (out.float() - exact).abs().max() < 0.2
    out.float().pow(3).sum().backward()
    gradients(at.adapters(model)["default"])


@pytest.mark.parametrize("method", [at.LoRA(rank=1), at.VeRA(rank=1)], ids=lambda m: type(m).__name__)
def test_a_small_change_survives_a_bfloat16_base(method):
    """1 + 1e-3 is 1 in bfloat16: a change that were added to the weight would be no change."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    adapter = at.adapt(model, {"0": method})
    x = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    assert model(x).item() == 0
    perturb(adapter, scale=0.02 if isinstance(method, at.LoRA) else 0.004)
    out = model(x).item()
    wide = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        wide[0].weight.fill_(1.0)
    other = at.adapt(wide, {"0": method})
    other.load_state(adapter.state())
    expected = wide(x.float()).item()
    assert 1e-5 < abs(expected) < 1.5e-3
    assert abs(out - expected) < 0.3 * abs(expected)


def test_train_over_bfloat16_steps_in_float32():
    """A step of 1e-4 on a norm's weight of 1 is lost in bfloat16 and kept in the stand-in."""
    model = tower(torch.bfloat16)
    adapter = at.adapt(model, {"*norm": at.Train()})
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for p in adapter.parameters():
        p.grad = torch.full_like(p, 1e-4)
    optimizer.step()
    for p, was in zip(adapter.parameters(), before, strict=True):
        assert p.dtype == torch.float32
        assert torch.allclose(was - p, torch.full_like(p, 1e-4), rtol=0.05)


def test_one_dtype_among_trainable_parameters():
    model = tower(torch.bfloat16)
    perturb(at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2), "*norm": at.Train(), "mlp": at.Bottleneck(size=4)}))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_half_of_a_model_in_another_type():
    """A float32 norm or head inside a half-precision model keeps its own."""
    model = tower(torch.bfloat16)
    model.blocks[1].float()
    model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0].float(),))
    model.norm.register_forward_pre_hook(lambda m, args: (args[0].to(torch.bfloat16),))
    bare = logits(model, ids())
    perturb(at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2), "*.mlp.up": at.HRA(rank=2)}))
    out = logits(model, ids())
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out, bare)


@pytest.mark.parametrize("training", [False, True])
def test_rows_under_autocast(training):
    """The factors of the rows stay in float32 beside an output in bfloat16."""
    model, names = tower(), ["a", "b", "a"]
    for seed, name in enumerate("ab"):
        adapted(model, "lora", name, seed=seed)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        with at.using(model, at.Rows(names)):
            together = model(ids())
        for row, name in enumerate(names):
            with at.using(model, name):
                alone = model(ids())[row]
            assert together.dtype == alone.dtype
            assert (together[row] - alone).abs().max() < 0.1


def test_a_chain_that_no_product_casts_under_autocast():
    """One matrix and a vector on x: the input of the last product is in float32 yet, the layer's output in bfloat16."""

    @at.register("test/columns", source="here")
    class Columns(at.WeightMethod):
        def tensors(self, site):
            return {"B": torch.full((site.outputs, site.inputs), 0.1), "v": torch.ones(site.inputs)}

        def factors(self, _, B, v):
            return B, v

    layer, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 3, 6)
    adapter = at.adapt(layer, Columns(), on="0")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out - layer(x)).abs().max() < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


class _Squeezed(torch.autograd.Function):
    """A linear of somebody else's, which keeps its output for the backward pass."""

    @staticmethod
    def forward(ctx, x, W):
        y = torch.tanh(x @ W.mT)
        ctx.save_for_backward(y, W)
        return y

    @staticmethod
    def backward(ctx, g):
        y, W = ctx.saved_tensors
        return (g * (1 - y * y)) @ W, None


class _Weight(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return _Squeezed.apply(args[0], args[1].as_subclass(torch.Tensor).detach())
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("active", ["a", at.Rows(["a", "b", None])], ids=str)
def test_a_weight_whose_linear_keeps_its_output(active):
    """What the layer gave is another's as well, so the adapter's part is added beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    model[0].weight = nn.Parameter(torch.randn(4, 6).as_subclass(_Weight), requires_grad=False)
    for seed, name in enumerate("ab"):
        perturb(at.adapt(model, at.LoRA(rank=2), on="0", name=name), seed=seed)
    at.use(model, active)
    x = torch.randn(3, 2, 6, dtype=torch.float32, requires_grad=True)
    model(x).sum().backward()
    got = x.grad.clone()
    x.grad = None
    changes = []
    for name in ("a", "b") if isinstance(active, at.Rows) else ("a", "a", "a"):
        A, B = (at.adapters(model)[name].parts[0].tensor(word) for word in "AB")
        changes.append(B @ A)
    changes += [torch.zeros_like(changes[0])] * (3 - len(changes))
    W = model[0]._parameters["weight"].as_subclass(torch.Tensor).detach()
    (torch.tanh(x @ W.mT) + x @ torch.stack(changes).mT).sum().backward()
    torch.testing.assert_close(got, x.grad)
