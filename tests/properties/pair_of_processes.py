"""Every method under DDP and FSDP2 in one pair of processes: `torchrun ... pair_of_processes.py RESULTS.json`.

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
from grid import SAMPLES, adapted, gradients, loss
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_model import bits, distance, ids, toy

import attunement as at

GIVEN = ids(4)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(sample, kind: str) -> None:
    torch.manual_seed(0)
    model = toy(torch.float32).train()
    adapters = {name: adapted(model, sample, name=name, seed=seed) for seed, name in enumerate("ab")}
    plain = copy.deepcopy(model)
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    mine = GIVEN.chunk(2)[dist.get_rank()]
    for name in "ab":  # a swap as well
        for one in (model, plain):
            at.use(one, name)
            one.zero_grad()
        parallel = DistributedDataParallel(model) if kind == "ddp" else model
        expected = plain(GIVEN)
        loss(expected).backward()
        for _ in range(2):  # DDP names an unused parameter at the second step
            model.zero_grad()
            logits = parallel(mine)
            loss(logits).backward()
        assert distance(logits.detach(), expected.detach().chunk(2)[dist.get_rank()]) <= 1e-4, "other outputs"
        right = gradients(at.adapters(plain)[name])
        for key, parameter in adapters[name].named_parameters():
            assert parameter.grad is not None, f"{key} of {name!r} got no gradient"
            apart = distance(whole(parameter.grad), right[key])
            assert apart <= 1e-3, f"{key} of {name!r}: gradients are {apart:.1e} apart"
        found = {key: whole(tensor) for key, tensor in adapters[name].state().items()}
        for key, tensor in at.adapters(plain)[name].state().items():
            assert torch.equal(found[key], tensor), f"{key} of {name!r} changed"
        for key, tensor in bits(plain).items():
            assert torch.equal(whole(model.state_dict()[key]), tensor), f"{key} of the base changed"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    found = {}
    for sample in SAMPLES:
        for kind in ("ddp", "fsdp"):
            try:
                check(sample, kind)
                said = ""
            except Exception:
                said = traceback.format_exc()
            everywhere = [None, None]
            dist.all_gather_object(everywhere, said)
            found[f"{sample.id} {kind}"] = next(filter(None, everywhere), "")
            if dist.get_rank() == 0:
                Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
