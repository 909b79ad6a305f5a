"""Runs of a recipe in processes of their own; the imports, which take the longest, are made once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["attunement.cli", "attunement.train.run", "transformers.trainer"])


def killed(file: Path, step: int, phase: int = 1) -> bool:
    """Whether `attune train FILE` got as far as that step, behind which it kills itself."""
    process = _processes.Process(target=_train, args=(file, step, phase, torch.get_num_threads()))
    process.start()
    process.join(300)
    return process.exitcode == -signal.SIGKILL


def _train(file: Path, step: int, phase: int, threads: int) -> None:
    from attunement import cli
    from attunement.train import trainer

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.trainer.phase, state.global_step) == (phase, step):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer._BeforeStep.on_step_end = on_step_end  # type: ignore[method-assign]
    multiprocessing.set_start_method("fork", force=True)  # whose locks outlive no process that is killed
    torch.set_num_threads(threads)  # how many there are decides the last bits of a sum
    sys.argv = ["attune", "train", str(file)]
    cli.main()


def pair(script: Path, *arguments: object) -> list[int | None]:
    """The exit codes of a script in two processes that know of each other as `torchrun` would tell them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    each = [{**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [_processes.Process(target=_script, args=(script, list(map(str, arguments)), one)) for one in each]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode for process in both]


def _script(script: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
