"""One thread and one seed for every test, and no telemetry or hub access."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """A `torch.compile` that has seen nothing, before the test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
