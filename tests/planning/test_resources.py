"""Workers of a machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from harness.core.sweep import Cluster, Sweep
from harness.planning.resources import count_workers

Make = Callable[..., Sweep]


def test_workers(demo_sweep: Make) -> None:
    runtime = demo_sweep("method=rtn", "scheme=w4").runtime
    assert count_workers(runtime) == 1
    assert count_workers(dataclasses.replace(runtime, cluster=Cluster("local", workers=3))) == 3
    assert count_workers(dataclasses.replace(runtime, cluster=Cluster("local"))) >= 1
