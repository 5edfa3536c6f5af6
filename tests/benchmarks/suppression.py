"""Suppression of overlapping boxes on a CPU: CPU time beside torchvision's, and whether both keep the same.

    python tests/benchmarks/suppression.py [--boxes 500 2000 10000] [--rounds 20]

Boxes like those of a region proposal network, which lie around objects: five groups as for five levels of a pyramid,
IoU 0.7. Both sides take turns; each has its best time of all rounds.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torchvision.ops
from torch import Tensor

from aligndet_cli.detectors.parts import suppression

Inputs = tuple[Tensor, Tensor, Tensor, float]
SIDES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "torchvision": torchvision.ops.batched_nms,
    "aligndet": suppression.batched_nms,
}


def drawn(num: int) -> Inputs:
    """Return (num, 4) xyxy boxes around 40 objects in an image of 800x1333 pixels, (num,) scores and groups."""
    torch.manual_seed(num)
    object_index = torch.randint(0, 40, (num,))
    centres = torch.rand(40, 2)[object_index] * torch.tensor([1333.0, 800.0]) + 20 * torch.randn(num, 2)
    sides = (torch.rand(40, 2)[object_index] * 180 + 20) * torch.exp(0.2 * torch.randn(num, 2))
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    return boxes, torch.rand(num), torch.randint(0, 5, (num,)), 0.7


def measure(inputs: Inputs, rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each side."""
    best = dict.fromkeys(SIDES, float("inf"))
    for _ in range(rounds):
        for name, function in SIDES.items():
            began = time.thread_time()
            function(*inputs)
            best[name] = min(best[name], time.thread_time() - began)
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each number of boxes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[500, 2000, 10000])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for num in options.boxes:
        inputs = drawn(num)
        kept = [function(*inputs) for function in SIDES.values()]
        times = measure(inputs, options.rounds)
        shown = ", ".join(f"{name} {1e3 * seconds:.2f} CPU-ms" for name, seconds in times.items())
        ratio = times["torchvision"] / times["aligndet"]
        equal = "equal" if torch.equal(*kept) else "NOT EQUAL"
        print(f"{num} boxes, {len(kept[0])} kept: {shown}, {ratio:.1f} times as fast, {equal}")


if __name__ == "__main__":
    main()
