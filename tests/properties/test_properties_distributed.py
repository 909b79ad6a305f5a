"""Two gloo processes under DDP and FSDP2; see `pair_of_processes.py` for what is compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grid import SHARED, once, promise, selected

HERE = Path(__file__).parent
every_shared = pytest.mark.parametrize(
    ("sample", "where"), SHARED, ids=[f"{sample.id}-{where}" for sample, where in SHARED]
)


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """{sample and kind: a traceback, or nothing}, from one pair of processes for all methods that are tested together."""
    return once("pair", tmp_path_factory, lambda: run(tmp_path_factory.mktemp("pair"), selected(request)))


def run(folder: Path, chosen: list[str]) -> dict[str, str]:
    results, wanted = folder / "results.json", folder / "wanted.json"
    wanted.write_text(json.dumps(chosen))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(HERE / "pair_of_processes.py"), str(results), str(wanted)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return {"": done.stderr[-3000:], **(json.loads(results.read_text()) if results.exists() else {})}


@every_shared
@promise("ddp")
def test_ddp_gives_the_gradients_of_one_process(sample, where, found):
    assert found.get(f"{sample.id}@{where} ddp", f"the processes ended before: {found['']}") == ""


@every_shared
@promise("fsdp")
def test_fsdp2_gives_the_gradients_of_one_process(sample, where, found):
    assert found.get(f"{sample.id}@{where} fsdp", f"the processes ended before: {found['']}") == ""
