"""Point 2: a plan is a tuple of holders, so tensors may be replaced, moved and emptied under it."""

import pytest
import torch
from hostile import QUERY_VALUE, RECIPES, adapted, adapter_keys, close, ids, logits, perturb, tower
from torch._dynamo.testing import CompileCounterWithBackend

import attunement as at


def compiled_with_counter(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize(
    ("recipe", "training"), [("lora", False), ("lora", True), ("vera", False), ("parallel", False), ("mixed", True)]
)
def test_a_swap_costs_no_recompilation(recipe, training, fresh_compiler):
    model = tower(blocks=1)
    names = [f"a{i}" for i in range(4)]
    expected = {}
    for i, name in enumerate(names):
        adapted(model, recipe, name, seed=i)
        expected[name] = logits(model, ids())
    compiled, counter = compiled_with_counter(model)
    with torch.set_grad_enabled(training):
        at.use(model, names[0])
        compiled(ids())
        compiled(ids())
        first = counter.frame_count
        for name in [*names, *reversed(names)]:
            at.use(model, name)
            assert close(compiled(ids()).detach(), expected[name])
        assert counter.frame_count == first, "a swap recompiled"
        at.use(model, None)
        compiled(ids())
        once = counter.frame_count
        assert once <= first + 1
        for name in (names[1], None, names[2], None):
            at.use(model, name)
            compiled(ids())
        assert counter.frame_count == once


def test_another_scale_costs_no_recompilation(fresh_compiler):
    model = tower(blocks=1)
    compiled, counter = compiled_with_counter(model)
    counts = []
    for i, alpha in enumerate([2.0, 3.0, 7.5]):
        perturb(at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2, alpha=alpha)}, name=f"a{i}"))
        with torch.no_grad():
            out = compiled(ids())
        assert close(out, logits(model, ids()))
        counts.append(counter.frame_count)
    for i in range(3):
        at.use(model, f"a{i}")
        with torch.no_grad():
            compiled(ids())
    assert counter.frame_count <= counts[0] + 1, f"compiled {counter.frame_count} times, {counts}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_followed(recipe, assign):
    model, other = tower(), tower()
    adapter = adapted(model, recipe, seed=0)
    adapted(other, recipe, seed=1)
    model(ids())
    new = {key: value.clone() for key, value in other.state_dict().items()}
    model.load_state_dict(new, assign=assign)
    assert torch.equal(logits(model, ids()), logits(other, ids()))
    model(ids()).pow(3).sum().backward()
    named = dict(model.named_parameters())
    for name, parameter in adapter.named_parameters():
        assert any(parameter is p for p in named.values()), f"the adapter still holds the old {name}"
        assert parameter.requires_grad
        assert parameter.grad is not None
    if assign:
        assert all(model.state_dict()[key].data_ptr() == new[key].data_ptr() for key in adapter_keys(model, "default"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("assign", [False, True])
def test_to_meta_and_back(recipe, assign):
    """As deferred initialisation and FSDP do it: what the state dict does not hold is lost."""
    model = tower()
    bare = logits(model, ids())
    adapted(model, recipe, "a")
    adapted(model, recipe, "b", seed=1)
    at.use(model, "a")
    out = logits(model, ids())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta")
    assert model(ids().to("meta")).is_meta
    if not assign:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    model.load_state_dict(state, assign=assign)
    assert torch.equal(logits(model, ids()), out)
    at.use(model, None)
    assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("recipe", RECIPES)
def test_to_after_attach(recipe):
    model = tower()
    adapted(model, recipe)
    out = logits(model, ids())
    model.double()
    assert logits(model, ids()).dtype == torch.float64
    assert close(logits(model, ids()).float(), out, 1e-5)
    model.to(torch.bfloat16)
    assert logits(model, ids()).dtype == torch.bfloat16
    assert close(logits(model, ids()).float(), out, 0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_functional_call_reaches_the_adapter(recipe):
    model, other = tower(), tower()
    adapter = adapted(model, recipe)
    adapted(other, recipe, seed=1)
    names = {id(p) for p in adapter.parameters()}
    trained = [name for name, p in model.named_parameters() if id(p) in names]
    given = {name: other.get_parameter(name).detach().clone().requires_grad_() for name in trained}
    out = torch.func.functional_call(model, given, (ids(),))
    assert torch.equal(out, other(ids()))
    grads = torch.autograd.grad(out.pow(3).sum(), list(given.values()))
    assert any(g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("graded", [False, True])
def test_functional_transforms_reach_the_adapter(graded):
    """Over a stack of adapters, rows alone and tangents: no sum may be made in a tensor that has not their levels."""
    model = tower()
    adapter = adapted(model, "lora")
    names = {id(p) for p in adapter.parameters()}
    one = {name: p.detach() for name, p in model.named_parameters() if id(p) in names}
    stack = {name: torch.stack([p, 2 * p, -p]) for name, p in one.items()}
    batch = ids()

    def run(given):
        return torch.func.functional_call(model, given, (batch,))

    with torch.set_grad_enabled(graded):
        out = torch.func.vmap(run)(stack)
        for i in range(3):
            assert close(out[i].detach(), run({name: p[i] for name, p in stack.items()}).detach())
        _, pushed = torch.func.jvp(run, (one,), (one,))
        gradient = torch.func.grad(lambda given: run(given).pow(3).sum())(one)
        slope = 3 * (run(one) ** 2 * pushed).sum()
    assert slope.abs() > 1
    assert close(sum((gradient[name] * p).sum() for name, p in one.items()), slope.detach(), 1e-4)


def test_use_holds_no_tensor_outside_the_modules():
    """`named_parameters` of an adapter is looked up, not remembered."""
    model = tower()
    adapter = adapted(model, "lora")
    old = list(adapter.parameters())  # kept alive, so that no new one gets its address
    model._apply(lambda tensor: tensor.clone())
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    assert not {id(p) for p in old} & {id(p) for p in adapter.parameters()}
    model(ids()).pow(3).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("what", ["rows", "sum", "stack", "average"])
@pytest.mark.parametrize("change", ["in place", "optimizer", "load", "assign", "object", "data"])
def test_nothing_computed_earlier_survives_a_change(what, change):
    """Whatever a combination caches from the tensors has to notice every way of changing them."""
    model = tower()
    a, _b = adapted(model, "lora", "a"), adapted(model, "lora", "b", seed=1)
    at.use(
        model,
        {"rows": at.Rows(["a", "b", None]), "sum": at.Sum("a", "b"), "stack": at.Stack("a", "b"),
         "average": at.Average("a", "b")}[what],
    )  # fmt: skip
    model.eval()
    for _ in range(2):
        stale = logits(model, ids())
    if change == "in place":
        perturb(a, seed=7)
    elif change == "optimizer":
        optimizer = torch.optim.SGD(a.parameters(), lr=0.5)
        model(ids()).pow(3).sum().backward()
        optimizer.step()
    elif change in ("load", "assign"):
        state = {key: value.clone() + 0.1 * (".attuned.a." in key) for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=change == "assign")
    elif change == "object":
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None and any(p is q for q in a.parameters()):
                    module._parameters[key] = torch.nn.Parameter(p.detach() + 0.1)
    else:
        for p in a.parameters():
            p.data = p.data + 0.1
    now = logits(model, ids())
    assert not torch.equal(now, stale)
    rebuilt = tower()
    for name in ("a", "b"):
        at.adapt(rebuilt, RECIPES["lora"](), name=name)
    rebuilt.load_state_dict(model.state_dict())
    at.use(
        rebuilt,
        {"rows": at.Rows(["a", "b", None]), "sum": at.Sum("a", "b"), "stack": at.Stack("a", "b"),
         "average": at.Average("a", "b")}[what],
    )  # fmt: skip
    assert torch.equal(now, logits(rebuilt.eval(), ids()))


def test_rows_compile_in_one_graph(fresh_compiler):
    model = tower(blocks=1)
    adapted(model, "lora", "a")
    adapted(model, "lora", "b", seed=1)
    compiled, counter = compiled_with_counter(model)
    with torch.no_grad():
        for rows in (["a", "b", None], ["b", None, "a"]):
            at.use(model, at.Rows(rows))
            assert close(compiled(ids()), logits(model, ids()))
    assert counter.frame_count >= 1


@pytest.mark.parametrize(
    ("how", "recipe"),
    [("wrapper", "lora"), ("wrapper", "dora"), ("wrapper", "mixed"), ("in place", "mixed"), ("blocks", "mixed")],
)
def test_a_model_compiled_before_it_is_adapted(how, recipe, fresh_compiler):
    """The compiled program has to notice the exchanged classes, in both directions."""
    plain = tower(blocks=1)
    bare = logits(plain, ids())
    adapted(plain, recipe)
    out = logits(plain, ids())
    model = tower(blocks=1)
    if how == "wrapper":
        run = torch.compile(model, backend="aot_eager")
    else:
        for part in [model] if how == "in place" else model.blocks:
            part.compile(backend="aot_eager")
        run = model
    assert close(logits(run, ids()), bare)
    adapted(model, recipe)
    assert close(logits(run, ids()), out)
    at.detach(model)
    assert close(logits(run, ids()), bare)
