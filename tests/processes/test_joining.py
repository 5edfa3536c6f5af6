"""What is said when another process of the run hangs or is gone."""

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligndet_cli.errors import RunError
from aligndet_cli.processes.joining import LostPartner, lost_partners

HANGS = "waited 0.5 minutes for another process of the run, which hangs"
GONE = "another process of the run is gone"

# As gloo, NCCL's part of torch and c10d word them.
MESSAGES = [
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms"), HANGS),
    (RuntimeError("Application timeout caused pair closure"), HANGS),
    (RuntimeError("Operation timed out!"), HANGS),
    (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1)"), HANGS),
    (dist.DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//1"), HANGS),
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1"), GONE),
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [::1]:1: Connection reset"), GONE),
    (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), GONE),
    (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), GONE),
]


@pytest.mark.parametrize(("error", "line"), MESSAGES, ids=[str(error)[-40:] for error, _ in MESSAGES])
def test_every_wording_is_known(error: RuntimeError, line: str) -> None:
    with pytest.raises(RunError, match=line) as raised, lost_partners(0.5):
        raise error
    assert isinstance(raised.value, LostPartner) == (line == GONE)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), lost_partners(0.5):
        raise RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")


def test_of_two_operations_that_wait_both_say_that_another_process_hangs(tmp_path: Path) -> None:
    # As the gradients of two buckets: gloo tells the second one of the first one's timeout, in words of its own.
    timeout = datetime.timedelta(seconds=1)

    def join(rank: int) -> Any:
        store = dist.PrefixStore("test", dist.FileStore(str(tmp_path / "store"), 2))
        return dist.ProcessGroupGloo(store, rank, 2, timeout)

    with ThreadPoolExecutor(2) as threads:
        waiting, _hanging = threads.map(join, (0, 1))
    works = [waiting.allreduce([torch.zeros(4)]) for _ in range(2)]
    for work in works:
        with pytest.raises(RunError, match=HANGS), lost_partners(0.5):
            work.wait()
