"""Every method under DDP and FSDP2 in one pair of processes: `torchrun ... pair_of_processes.py RESULTS.json WANTED.json`.

Gradients and outputs are compared with one process that sees the whole batch.
"""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from grid import SHARED, STRUCTURES, adapted, gradients, loss
from homes import given, home, run, some
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_model import bits, distance

import attunement as at


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(sample, where: str, kind: str) -> None:
    torch.manual_seed(0)
    model = home(where, torch.float32).train()
    batch = given(model, 4)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    adapters = {name: adapted(model, sample, name=name, seed=seed) for seed, name in enumerate("ab")}
    plain = copy.deepcopy(model)
    if kind == "fsdp":
        for place in STRUCTURES[where].blocks:
            fully_shard(model.get_submodule(place.name))
        fully_shard(model)
    for name in "ab":  # a swap as well
        for one in (model, plain):
            at.use(one, name)
            one.zero_grad()
        parallel = DistributedDataParallel(model) if kind == "ddp" else model
        expected = run(plain, batch)
        loss(expected).backward()
        for _ in range(2):  # DDP names an unused parameter at the second step
            model.zero_grad()
            logits = run(parallel, some(batch, half))
            loss(logits).backward()
        assert distance(logits.detach(), expected.detach()[half]) <= 1e-4, "other outputs"
        right = gradients(at.adapters(plain)[name])
        largest = max(float(gradient.abs().max()) for gradient in right.values())
        for key, parameter in adapters[name].named_parameters():
            assert parameter.grad is not None, f"{key} of {name!r} got no gradient"
            apart = float((whole(parameter.grad) - right[key]).abs().max())
            assert apart <= 1e-3 * float(right[key].abs().max()) + 1e-6 * largest, (
                f"{key} of {name!r}: gradients are {apart:.1e} apart"
            )
    for name, adapter in adapters.items():
        found = {key: whole(tensor) for key, tensor in adapter.state().items()}
        for key, tensor in at.adapters(plain)[name].state().items():
            assert torch.equal(found[key], tensor), f"{key} of {name!r} changed"
    found = model.state_dict()
    for key, tensor in bits(plain).items():
        assert torch.equal(whole(found[key]), tensor), f"{key} of the base changed"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    found, wanted = {}, set(json.loads(Path(sys.argv[2]).read_text()))
    for sample, where in (pair for pair in SHARED if f"{pair[0].id}@{pair[1]}" in wanted):
        for kind in ("ddp", "fsdp"):
            try:
                check(sample, where, kind)
                said = ""
            except Exception:
                said = traceback.format_exc()
            everywhere = [None, None]
            dist.all_gather_object(everywhere, said)
            found[f"{sample.id}@{where} {kind}"] = next(filter(None, everywhere), "")
            if dist.get_rank() == 0:
                Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
