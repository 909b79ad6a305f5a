"""`python -m benchmarks [name ...] [--quick] [--threads N] [--accuracy]`."""

from __future__ import annotations

import argparse
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.accuracy import accuracy
from benchmarks.bars import BARS, ONE_THREAD, Result
from benchmarks.methods import METHOD_BARS
from benchmarks.report import show, write, write_table


def main() -> None:
    bars = {**BARS, **METHOD_BARS}
    every = [*bars, "accuracy"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Attunement beside PEFT on this machine.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(every)}; all but the last by default")
    parser.add_argument("--accuracy", action="store_true", help="train MiniLM on banking77 on both sides too: minutes")
    parser.add_argument("--quick", action="store_true", help="a look: two seconds a bar, and no file is written")
    parser.add_argument("--threads", type=int, help=f"of torch; by default 1 for {', '.join(ONE_THREAD)}, else all")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in every]:
        parser.error(f"there is no {unknown[0]!r}; there are {', '.join(every)}")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    cores, seconds = torch.get_num_threads(), 2.0 if asked.quick else 20.0
    done: list[Result] = []
    for name in asked.names or (every if asked.accuracy else bars):
        torch.set_num_threads(asked.threads or (1 if name in ONE_THREAD else cores))
        found = list(accuracy() if name == "accuracy" else bars[name](seconds))
        show(found)
        done += found
        if not asked.quick:
            write(name, found)
            write_table(every)
    if len(found) < len(done):
        show(done)


if __name__ == "__main__":
    main()
