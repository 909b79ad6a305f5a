"""One thread and one seed for every test, and no telemetry or hub access."""

import gc
import os
import sys
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(50_000)  # there are tens of thousands of tests, and looking through them for garbage takes its time


def pytest_collection_finish():
    """The tests themselves are no garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers whatever ran before."""
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:  # which would keep a stack trace for each kind of device that may come to use later
        torch.default_generator.manual_seed(0)


@pytest.fixture
def attune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, what it printed, what it complained of."""
    from rich.console import Console

    from attunement import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attune", *map(str, arguments)])
        monkeypatch.setattr(cli, "console", Console(width=160))
        monkeypatch.setattr(cli, "errors", Console(stderr=True, width=160))
        code: object = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        return int(str(code or 0)), said.out, said.err

    return call


@pytest.fixture
def fresh_compiler():
    """A `torch.compile` that has seen nothing, before the test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
