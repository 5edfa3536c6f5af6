import os

import pytest

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import resolve_devices


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_workers": 1000}, "--devices auto and --num-workers 1000: 1001 processes on a machine of 2 CPUs"),
        ({"devices": "99"}, "--devices 99 on a machine of 2 CPUs"),
        ({"devices": "3", "num_workers": 10}, "--devices 3 and --num-workers 10: 33 processes"),
    ],
)
def test_more_processes_than_a_machine_bears_are_refused(
    settings: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"^{told}.*32 processes at most"):
        resolve_devices(RuntimeConfig.model_validate({"accelerator": "cpu", **settings}))


def test_as_many_processes_as_a_machine_bears_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    devices = resolve_devices(RuntimeConfig(accelerator="cpu", devices="2", num_workers=15))
    assert devices.world_size == 2
