"""Two gloo processes under DDP and FSDP2, gradients compared with one process; see `two_processes.py` for the cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import CASES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One pair of processes runs all cases."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "two_processes.py"), str(folder / "results.json"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    written = folder / "results.json"
    return json.loads(written.read_text()) if written.exists() else {}, done.stderr[-3000:]


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, results):
    found, log = results
    assert name in found, f"the processes ended before this case: {log}"
    assert not found[name], found[name]
