"""Small words for a terminal: how this program is called from here, and values and paths short enough for a sentence."""

from __future__ import annotations

import os
import reprlib
import shlex
import shutil
import sys
from pathlib import Path

from attunement.errors import AttunementError


def command() -> str:
    """What to type for this program: `attune` where the shell finds this very one, its path where it is not activated."""
    beside = Path(sys.executable).parent / "attune"
    found = shutil.which("attune")
    if found is not None and Path(found).resolve().parent == beside.resolve().parent:
        return "attune"
    return near(beside) if beside.exists() else shlex.join([near(sys.executable), "-m", "attunement"])


def near(path: str | Path) -> str:
    """A path as seen from the current folder where that is shorter; anything but a path inside it is left as it is."""
    text = str(path)
    inside = os.path.isabs(text) and Path(text).is_relative_to(Path.cwd())
    return str(Path(text).relative_to(Path.cwd())) if inside else text


def short(value: object, length: int = 60) -> str:
    """The `repr` of a value, cut in the middle where it is long."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = length
    text = cut.repr(value)
    return text if len(text) <= 2 * length else f"{text[:length]}...{text[-3:]}"


def not_alone(command: str) -> None:
    """Refuse to be the only process of an `accelerate launch --num_processes 2`, which would say nothing of it.

    Raises `AttunementError` with the launcher that starts both.
    """
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise AttunementError(
            f"{command}: several processes were asked of accelerate launch, and it started one, as it does where there "
            f"are no several GPUs; use torchrun --nproc-per-node 2 -m attunement {command}"
        )
