"""Point 15: recomputation runs the plan of its forward, whatever is active when it happens."""

import copy
import functools
import warnings

import pytest
import torch
from hostile import RECIPES, adapted, bert, close, gpt2, gradients, ids, llama, perturb, tower
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import attunement as at

WHAT = {
    "one": "a",
    "other": "b",
    "sum": at.Sum("a", "b"),
    "stack": at.Stack("a", "b"),
    "rows": at.Rows(["a", "b", None]),
}
RECIPE = {
    "lora": {"attention.*": at.LoRA(rank=2)},
    "mixed": {"attention.*": at.LoRA(rank=2), "mlp": at.Bottleneck(size=3), "norm": at.Train()},
    "vera": {"mlp.{up,down}": at.VeRA(rank=4)},
    "dora": {"attention.*": at.DoRA(rank=2)},
}


def enable(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def run(make, recipe, what, reentrant=None, when="after", inside=False):
    """Gradients of both adapters, the forward in a `using` block and the backward outside of it (or inside)."""
    model = make().train()
    if reentrant is not None and when == "before":
        enable(model, reentrant)
    adapters = [perturb(at.adapt(model, RECIPE[recipe], name=name), seed=i) for i, name in enumerate("ab")]
    if reentrant is not None and when == "after":
        enable(model, reentrant)
    at.use(model, None)
    recomputed = []
    counted = [m for m in model.modules() if type(m).__name__ in ("LlamaMLP", "BertIntermediate", "GPT2MLP")]
    handles = [m.register_forward_pre_hook(lambda *_: recomputed.append(1)) for m in counted]
    with at.using(model, what):
        out = model(ids())
        loss = (out.logits if "logits" in out else out.last_hidden_state).pow(3).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for handle in handles:
        handle.remove()
    assert len(recomputed) == len(counted) * (1 if reentrant is None else 2), "checkpointing did not take place"
    return loss.detach(), {(x.name, n): p.grad for x in adapters for n, p in x.named_parameters()}


def equal(left, right):
    assert close(left[0], right[0])
    assert any(g is not None and g.abs().sum() > 0 for g in right[1].values())
    for key, expected in right[1].items():
        if expected is None or not expected.abs().sum():
            assert left[1][key] is None or not left[1][key].abs().sum(), f"{key} got a gradient of another plan"
        else:
            assert left[1][key] is not None, f"{key} lost its gradient"
            assert close(left[1][key], expected, 1e-4), key


def test_a_backward_after_using_reaches_the_adapter():
    """Leaving the block must not take the gradient away, checkpointing or not."""
    equal(run(llama, "mixed", "a"), run(llama, "mixed", "a", inside=True))


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_those_without(reentrant, when, what):
    plain = run(llama, "mixed", WHAT[what])
    equal(run(llama, "mixed", WHAT[what], reentrant, when), plain)


@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", RECIPE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_for_every_form_and_kind_of_layer(reentrant, recipe, make):
    plain = run(make, recipe, "b")
    equal(run(make, recipe, "b", reentrant), plain)
    equal(run(make, recipe, "b", reentrant, inside=True), plain)


def test_two_forwards_before_one_backward():
    """Contrastive and preference losses run two plans and then go back through both."""
    model = llama().train()
    a, b = (perturb(at.adapt(model, RECIPE["mixed"], name=name), seed=i) for i, name in enumerate("ab"))

    def both():
        losses = []
        for what in ("a", "b", None):
            with at.using(model, what):
                losses.append(model(ids()).logits.pow(3).sum())
        (losses[0] - 2 * losses[1] + losses[2].detach()).backward()
        found = [gradients(a), gradients(b)]
        for p in (*a.parameters(), *b.parameters()):
            p.grad = None
        return found

    plain = both()
    for reentrant in (False, True):
        enable(model, reentrant)
        for one, other in zip(both(), plain, strict=True):
            assert all(close(one[key], other[key], 1e-4) for key in other)


def test_switched_off_again_and_detached():
    model = llama().train()
    adapter = adapter_of = perturb(at.adapt(model, RECIPE["lora"], name="a"))
    enable(model, False)
    model.gradient_checkpointing_disable()
    model(ids()).logits.pow(3).sum().backward()
    gradients(adapter_of)
    enable(model, False)
    adapter.detach()
    model(ids()).logits.pow(3).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_draws_the_same_mask_again(reentrant):
    grads = []
    for checkpointing in (None, reentrant):
        model = llama().train()
        adapter = perturb(at.adapt(model, {"attention.*": at.LoRA(rank=2, dropout=0.5)}))
        if checkpointing is not None:
            enable(model, checkpointing)
        torch.manual_seed(8)
        model(ids()).logits.pow(3).sum().backward()
        grads.append(gradients(adapter))
    assert all(close(grads[1][key], grads[0][key], 1e-4) for key in grads[0])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_written_by_hand(reentrant, recipe):
    """torch's own function around a block, with the plan still active at the backward."""
    model = tower().train()
    adapter = adapted(model, recipe)
    model(ids()).pow(3).sum().backward()
    expected = gradients(adapter)
    for p in adapter.parameters():
        p.grad = None
    x = model.embedding(ids()).detach().requires_grad_()
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    model.norm(x).pow(3).sum().backward()
    assert all(close(value, expected[key], 1e-4) for key, value in gradients(adapter).items())


@pytest.mark.parametrize("make", [llama, bert], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_of_the_graph_stays_after_recomputation(reentrant, make):
    """Recomputation stops early, in the middle of a block."""
    model = make().train()
    recipe = {"mlp": at.Bottleneck(size=3, style="parallel"), "attention": at.Bottleneck(size=3)}
    adapter = perturb(at.adapt(model, recipe))
    out = model(ids())[0]
    out.pow(3).sum().backward()
    expected = gradients(adapter)
    model.zero_grad()
    enable(model, reentrant)
    model(ids())[0].pow(3).sum().backward()
    assert all(close(value, expected[key], 1e-4) for key, value in gradients(adapter).items())
    assert torch.equal(copy.deepcopy(model)(ids())[0], out)


def test_enabled_on_the_whole_where_a_part_is_adapted():
    from transformers import BertForSequenceClassification

    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        inner = bert()
        model = BertForSequenceClassification(inner.config).train()
        adapters = [perturb(at.adapt(model.bert, RECIPE["mixed"], name=name), seed=i) for i, name in enumerate("ab")]
        if checkpointing:
            enable(model, False)
        with at.using(model.bert, "a"):
            loss = model(input_ids=ids()).logits.pow(3).sum()
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in adapters[0].named_parameters()}))
    equal(found[1], found[0])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_that_run_one_adapter_after_the_other(reentrant, when):
    found = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing and when == "before":
            enable(model, reentrant)
        recipe = {"mlp": at.Bottleneck(size=3, style="parallel"), "attention": at.Bottleneck(size=3)}
        adapters = [perturb(at.adapt(model, recipe, name=name), seed=i) for i, name in enumerate("ab")]
        if checkpointing and when == "after":
            enable(model, reentrant)
        with at.using(model, at.Rows(["a", at.Stack("a", "b"), "a"])):
            loss = model(ids()).logits.pow(3).sum()
            assert model._attuned_bench.one_by_one
        loss.backward()
        found.append((loss.detach(), {(x.name, n): p.grad for x in adapters for n, p in x.named_parameters()}))
    equal(found[1], found[0])


class ByHand(torch.nn.Module):
    """torch's own function around each block of a tower, or around nothing."""

    def __init__(self, reentrant):
        super().__init__()
        self.tower, self.reentrant = tower(), reentrant

    def forward(self, given):
        x = self.tower.embedding(given)
        if self.reentrant is not None and not x.requires_grad:
            x = x.detach().requires_grad_()
        for block in self.tower.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.tower.norm(x)


def by_hand(recipe, reentrant, backward):
    model = ByHand(reentrant).train()
    adapters = [perturb(at.adapt(model, RECIPES[recipe](), name=name), seed=i) for i, name in enumerate("ab")]
    backward(model)
    return torch.zeros(()), {(x.name, n): p.grad for x in adapters for n, p in x.named_parameters()}


def after_the_block(model):
    with at.using(model, "a"):
        loss = model(ids()).pow(3).sum()
    loss.backward()


def three_at_once(model):
    losses = []
    for what in ("a", at.Stack("b", "a"), None):
        with at.using(model, what):
            losses.append(model(ids()).pow(3).sum())
    (losses[0] - 2 * losses[1]).backward()


def rows(model):
    with at.using(model, at.Rows(["a", "b", None])):
        loss = model(ids()).pow(3).sum()
    loss.backward()


@pytest.mark.parametrize("backward", [after_the_block, three_at_once, rows])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_by_hand_whatever_is_active_at_the_backward(reentrant, recipe, backward):
    equal(by_hand(recipe, reentrant, backward), by_hand(recipe, None, backward))


def test_an_adapter_that_is_gone_before_the_backward():
    model = ByHand(False).train()
    adapters = [perturb(at.adapt(model, RECIPES["lora"](), name=name)) for name in "ab"]
    with at.using(model, "a"):
        loss = model(ids()).pow(3).sum()
    adapters[0].detach()
    with pytest.raises(at.AttunementError, match=r"computed again.*'a'"):
        loss.backward()


def test_whoever_switches_in_a_backward_pass_is_right():
    model = ByHand(None).train()
    for i, name in enumerate("ab"):
        perturb(at.adapt(model, RECIPES["lora"](), name=name), seed=i)
    seen = []

    def look(_):
        with torch.no_grad(), at.using(model, "b"):
            seen.append(model(ids()))

    with at.using(model, "a"):
        out = model(ids())
    out.register_hook(look)
    out.sum().backward()
    with at.using(model, "b"):
        assert torch.equal(seen[0], model(ids()))


def test_a_copy_and_another_thread():
    import threading

    model = ByHand(False).train()
    for i, name in enumerate("ab"):
        perturb(at.adapt(model, RECIPES["lora"](), name=name), seed=i)
    found = {}

    def train(name, model):
        loss = model(ids()).pow(3).sum()
        if name == "copy":
            at.use(model, "a")
        loss.backward()
        found[name] = gradients(at.adapters(model)["b"])
        model.zero_grad()

    train("here", model)
    train("copy", copy.deepcopy(model))
    thread = threading.Thread(target=train, args=("thread", model))
    thread.start()
    thread.join()
    for name in ("copy", "thread"):
        assert all(close(value, found["here"][key], 1e-4) for key, value in found[name].items())


@pytest.mark.parametrize("saved", ["mm", "addmm"])
@pytest.mark.parametrize("active", ["a", at.Sum("a", "b"), at.Rows(["a", "b", None])], ids=str)
def test_selective_checkpointing_keeps_outputs_as_they_were(active, saved):
    """It keeps what chosen operations gave: a sum made in there would be seen in the backward pass, or refused."""
    context = functools.partial(
        create_selective_checkpoint_contexts, [getattr(torch.ops.aten, saved).default, torch.ops.aten.bmm.default]
    )

    def gradients_of(call):
        model = nn.Sequential(nn.Linear(8, 8, bias=saved == "addmm"), nn.Tanh(), nn.Linear(8, 6, bias=saved == "addmm"))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        for seed, name in enumerate("ab"):
            perturb(at.adapt(model, at.LoRA(rank=2), on="*", name=name), seed=seed)
        at.use(model, active)
        x = torch.randn(3, 4, 8, requires_grad=True)
        call(model, x).pow(2).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = gradients_of(lambda model, x: model(x))
    again = gradients_of(lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=context))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
