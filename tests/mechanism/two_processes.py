"""Every case that needs two processes, run by one `torchrun`: `two_processes.py RESULTS.json FOLDER`.

Each case compares gradients, outputs or weights with a single-process run of the same model on the whole batch.
Points 1, 2, 7, 8, 15 and 17 of the mechanism.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from hostile import QUERY_VALUE, RECIPES, adapted, close, gradients, ids, llama, mixture, perturb, tower
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import attunement as at

CASES: dict[str, Callable[[], None]] = {}
FOLDER = Path(".")


def case(function):
    CASES[function.__name__] = function
    return function


def for_each(*names):
    def decorate(function):
        for name in names:
            CASES[f"{function.__name__}[{name}]"] = lambda name=name: function(name)
        return function

    return decorate


def mine(batch):
    """This process's half of a batch."""
    return batch.chunk(2)[dist.get_rank()]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_of(model, given):
    out = model(given)
    out = out if torch.is_tensor(out) else out.logits
    return out.pow(3).mean()


def expected_gradients(model, adapter, given):
    """On a copy, in one process, with the whole batch."""
    plain = copy.deepcopy(model)
    loss_of(plain, given).backward()
    return gradients(at.adapters(plain)[adapter.name])


def equal_gradients(adapter, expected, tolerance=1e-4):
    found = {name: p.grad for name, p in adapter.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None, f"{name} got no gradient"
        assert close(whole(grad).float(), expected[name].float(), tolerance), f"{name}: another gradient"


def sharded(model, **options):
    layers = model.blocks if hasattr(model, "blocks") else model.model.layers
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


GIVEN = ids(batch=4)


@for_each(*RECIPES)
def ddp(recipe):
    model = tower().train()
    a = adapted(model, recipe, "a")
    adapted(model, recipe, "b", seed=1)
    at.use(model, "a")
    expected = expected_gradients(model, a, GIVEN)
    parallel = DistributedDataParallel(model)
    for _ in range(3):  # an unused parameter is an error at the second step
        for p in a.parameters():
            p.grad = None
        loss_of(parallel, mine(GIVEN)).backward()
    equal_gradients(a, expected)
    inactive = [n for n, p in model.named_parameters() if ".attuned.b." in n and p.grad is not None]
    assert not inactive


@case
def ddp_rows():
    model = tower().train()
    adapters = [adapted(model, "lora", "a"), adapted(model, "lora", "b", seed=1)]
    at.use(model, at.Rows(["a", "b", "b", "a"]))
    plain = copy.deepcopy(model)
    loss_of(plain, GIVEN).backward()
    at.use(model, at.Rows(["a", "b"] if dist.get_rank() == 0 else ["b", "a"]))
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(parallel, mine(GIVEN)).backward()
    for adapter in adapters:
        equal_gradients(adapter, gradients(at.adapters(plain)[adapter.name]))


@for_each("reentrant", "saved")
def ddp_checkpointing(how):
    model = llama().train()
    adapter = perturb(at.adapt(model, {"attention.*": at.LoRA(rank=2), "mlp": at.Bottleneck(size=3)}))
    expected = expected_gradients(model, adapter, GIVEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(parallel, mine(GIVEN)).backward()
    equal_gradients(adapter, expected)


@for_each(*RECIPES)
def fsdp(recipe):
    model = tower().train()
    adapter = adapted(model, recipe)
    expected = expected_gradients(model, adapter, GIVEN)
    reference = loss_of(model, mine(GIVEN)).detach()
    sharded(model)
    for _ in range(2):
        for p in adapter.parameters():
            p.grad = None
        loss = loss_of(model, mine(GIVEN))
        assert close(loss.detach(), reference)
        loss.backward()
    equal_gradients(adapter, expected)


@for_each("lora", "vera", "mixed")
def fsdp_swap(recipe):
    model = tower().train()
    a, b = adapted(model, recipe, "a"), adapted(model, recipe, "b", seed=1)
    expected = {}
    for name, adapter in (("b", b), ("a", a)):
        at.use(model, name)
        expected[name] = expected_gradients(model, adapter, GIVEN)
    sharded(model)
    for adapter, other in ((a, b), (b, a), (a, b)):
        model.zero_grad()
        at.use(model, adapter.name)
        loss_of(model, mine(GIVEN)).backward()
        equal_gradients(adapter, expected[adapter.name])
        assert all(p.grad is None for p in other.parameters())


@case
def fsdp_bfloat16_base_with_train():
    model = tower(torch.bfloat16).train()
    adapter = perturb(
        at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2), "*norm": at.Train(), "mlp": at.Bottleneck(size=4)})
    )
    expected = expected_gradients(model, adapter, GIVEN)
    sharded(model)
    loss_of(model, mine(GIVEN)).backward()
    assert {whole(p.grad).dtype for p in adapter.parameters()} == {torch.float32}
    equal_gradients(adapter, expected, 0.1)


@for_each("lora", "vera", "mixed", "dora")
def fsdp_mixed_precision(recipe):
    model = tower().train()
    adapter = adapted(model, recipe)
    expected = expected_gradients(model, adapter, GIVEN)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    loss_of(model, mine(GIVEN)).float().backward()
    equal_gradients(adapter, expected, 0.2)


@for_each("lora", "vera", "mixed", "svfit")
def fsdp_from_meta(recipe):
    """Sharded while on meta, then filled: the way large models are started."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = tower().train()
    adapter = adapted(model, recipe)
    expected = expected_gradients(model, adapter, GIVEN)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sharded(model.to("meta")).to_empty(device="cpu")
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    loss_of(model, mine(GIVEN)).backward()
    equal_gradients(adapter, expected)


@for_each("lora", "vera", "mixed")
def fsdp_state_dict_and_save(recipe):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = tower()
    adapter = adapted(model, recipe)
    with torch.no_grad():
        expected = model(GIVEN)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sharded(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    folder = FOLDER / f"saved_{recipe}"
    adapter.save(folder)
    dist.barrier()
    other = tower()
    at.load(other, folder)
    with torch.no_grad():
        assert torch.equal(other(GIVEN), expected)


@for_each("lora", "mixed")
def fsdp_step(recipe):
    """Groups, clipping and an optimizer over sharded tensors end where one process does."""
    model = tower().train()
    adapter = adapted(model, recipe)
    plain = copy.deepcopy(model)
    sharded(model)
    for m, given in ((plain, GIVEN), (model, mine(GIVEN))):
        handle = at.adapters(m)["default"]
        optimizer = torch.optim.AdamW(handle.groups(lr=0.01))
        for _ in range(2):
            optimizer.zero_grad()
            (loss_of(m, given) + handle.penalty()).backward()
            handle.before_step()
            optimizer.step()
    expected = at.adapters(plain)["default"].state()
    found = {name: whole(p).detach() for name, p in adapter.named_parameters()}
    assert all(close(found[name], expected[name], 1e-4) for name in found)


@for_each("reentrant", "saved")
def fsdp_checkpointing(how):
    model = llama().train()
    a = perturb(at.adapt(model, {"attention.*": at.LoRA(rank=2), "mlp": at.Bottleneck(size=3)}, name="a"))
    perturb(at.adapt(model, {"attention.*": at.LoRA(rank=2)}, name="b"))
    at.use(model, "a")
    expected = expected_gradients(model, a, GIVEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
    sharded(model)
    loss_of(model, mine(GIVEN)).backward()
    equal_gradients(a, expected)


@case
def fsdp_experts():
    model = mixture("mixtral").train()
    adapter = perturb(at.adapt(model, {"experts.{gate,up,down}": at.LoRA(rank=2), "router": at.Train()}), scale=0.3)
    expected = expected_gradients(model, adapter, GIVEN)
    sharded(model)
    loss_of(model, mine(GIVEN)).backward()
    equal_gradients(adapter, expected)


@for_each("lora", "mixed", "dora")
def fsdp_of_every_linear(recipe):
    """Adapted modules that are sharded units of their own: their class is exchanged a second time, by FSDP2."""
    model = tower().train()
    adapter = adapted(model, recipe)
    expected = expected_gradients(model, adapter, GIVEN)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            fully_shard(module)
    sharded(model)
    loss_of(model, mine(GIVEN)).backward()
    equal_gradients(adapter, expected)


@for_each("lora", "mixed")
def fsdp_swap_to_none_and_detach(recipe):
    model = tower()
    with torch.no_grad():
        bare = model(GIVEN)
    adapter = adapted(model, recipe)
    with torch.no_grad():
        out = model(GIVEN)
    sharded(model)
    with torch.no_grad():
        assert close(model(GIVEN), out)
        at.use(model, None)
        assert close(model(GIVEN), bare)
        at.use(model, "default")
        assert close(model(GIVEN), out)
        adapter.detach()
        assert isinstance(model.blocks[0], FSDPModule), "detach took FSDP2's class away"
        assert close(model(GIVEN), bare)


@case
def fsdp_before_adapt():
    """Tensors added to a sharded model are in no group: refused, or their gradients are reduced all the same."""
    model = sharded(tower().train())
    keys = list(model.state_dict())
    try:
        adapter = at.adapt(model, {QUERY_VALUE: at.LoRA(rank=2)})
    except at.AttunementError:
        assert list(model.state_dict()) == keys
        return
    perturb(adapter)
    plain = tower().train()
    other = perturb(at.adapt(plain, {QUERY_VALUE: at.LoRA(rank=2)}))
    other.load_state(adapter.state())
    loss_of(plain, GIVEN).backward()
    loss_of(model, mine(GIVEN)).backward()
    equal_gradients(adapter, gradients(other))


def main() -> None:
    global FOLDER
    torch.set_num_threads(1)
    results, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = sys.argv[3:] or list(CASES)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    found = {}
    for name in chosen:
        torch.manual_seed(0)
        try:
            CASES[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        everywhere: list = [None, None]
        dist.all_gather_object(everywhere, found[name])
        found[name] = next(filter(None, everywhere), "")
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
