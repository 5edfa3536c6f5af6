"""Closed form against the per-instance loop: time, memory, value and gradient.

    python tests/benchmarks/contrastive.py [--boxes 2048] [--instances 100] [--repeats 3]

Each side runs in a process of its own, on one thread; times are CPU seconds, memory is the growth of the peak.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from aligndet_cli.pretrain_box.contrastive import contrastive_loss

TEMPERATURE = 0.5


def loop(online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor) -> Tensor:
    """Instance by instance, with a copy of all negatives beside every positive, as the published code goes about it."""
    terms = []
    for instance in online_ids[online_ids >= 0].unique():
        queries, keys = online[online_ids == instance], momentum[momentum_ids == instance]
        keys = keys if len(keys) else queries
        negatives = torch.cat([online[online_ids != instance].detach(), momentum[momentum_ids != instance]])
        choices = torch.cat([keys[:, None], negatives.expand(len(keys), -1, -1)], dim=1)  # (p, 1 + n, D)
        logits = torch.einsum("qd,pnd->pqn", queries, choices).flatten(0, 1) / TEMPERATURE  # (p * q, 1 + n)
        terms.append(cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)))
    return torch.stack(terms).mean()


def closed(online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor) -> Tensor:
    """Ours."""
    return contrastive_loss(online, online_ids, momentum, momentum_ids, temperature=TEMPERATURE).loss


def measure(side: str, boxes: int, instances: int) -> dict[str, float | list[float]]:
    """One forward and backward of a side after a warm-up on a small problem."""
    torch.set_num_threads(1)
    function = {"loop": loop, "closed": closed}[side]
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(boxes, 256, generator=generator) for _ in range(2)]
    ids = [torch.randint(0, instances, (boxes,), generator=generator) for _ in range(2)]
    small = normalize(embeddings[0][:64], dim=1).requires_grad_()
    function(small, ids[0][:64], normalize(embeddings[1][:64], dim=1), ids[1][:64]).backward()
    raw = embeddings[0].requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    loss = function(normalize(raw, dim=1), ids[0], normalize(embeddings[1], dim=1), ids[1])
    loss.backward()
    seconds = time.process_time() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert raw.grad is not None
    gradient = raw.grad.double()
    sample = gradient.flatten()[:: max(gradient.numel() // 500, 1)].tolist()
    return {"seconds": seconds, "mib": memory, "loss": loss.item(), "gradient": sample}


def in_own_process(side: str, args: argparse.Namespace) -> dict[str, float | list[float]]:
    """`measure` in a fresh process, so that peaks do not mix."""
    sizes = ["--boxes", str(args.boxes), "--instances", str(args.instances)]
    command = [sys.executable, __file__, "--side", side, *sizes]
    done = subprocess.run(
        command, capture_output=True, check=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, default=2048)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.boxes, args.instances)))
        return
    runs = [(in_own_process("loop", args), in_own_process("closed", args)) for _ in range(args.repeats)]
    slow = min(run[0]["seconds"] for run in runs)
    fast = min(run[1]["seconds"] for run in runs)
    memory = [max(run[side]["mib"] for run in runs) for side in (0, 1)]
    first = runs[0]
    worst = max(abs(a - b) for a, b in zip(first[0]["gradient"], first[1]["gradient"], strict=True))
    print(f"{args.boxes} boxes x 256, {args.instances} instances, one thread, best of {args.repeats}")
    print(f"loop    {slow:8.3f} CPU-s {memory[0]:9.1f} MiB  loss {first[0]['loss']:.7f}")
    print(f"closed  {fast:8.3f} CPU-s {memory[1]:9.1f} MiB  loss {first[1]['loss']:.7f}")
    print(
        f"ratio   {slow / fast:8.1f} x    {memory[0] / max(memory[1], 0.1):9.1f} x     gradients differ by {worst:.1e}"
    )


if __name__ == "__main__":
    main()
