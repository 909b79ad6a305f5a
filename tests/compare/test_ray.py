"""`--on ray`: a cluster of this machine with two workers."""

from __future__ import annotations

from typing import Any

import pytest

from attunement.compare import records
from attunement.compare.fan_out import on_ray

ray = pytest.importorskip("ray", reason="Ray is the extra [ray]")
pytestmark = pytest.mark.usefixtures("no_pictures")


def test_two_workers_of_ray_run_a_study(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    study = tiny(search={"trials": 1, "spread": 1, "evaluations": 1, "known": False})
    shown: list[tuple[int, int]] = []
    tally = on_ray(study, 2, lambda tally: shown.append((tally.done, tally.total)))
    assert not ray.is_initialized()
    found = records.read(study.folder).trials
    assert tally.done == tally.total == len(found) == 3 * 3 + 2
    assert all(one.state == "done" for one in found)
    assert shown[0] == (0, 11)
    assert shown[-1] == (11, 11)
    assert tally.busy > 0
    assert (study.folder / "report.html").is_file()
