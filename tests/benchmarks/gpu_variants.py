"""What other ways of writing a layer would gain on a GPU, before anything is rewritten.

    python tests/benchmarks/gpu_variants.py [--device cuda] [--rounds 5] [--output FOLDER]

Each line of `variants.md` is one way, and its time beside that of the first of its group, which is how the product does
it: frozen norms apart from their convolutions, folded into them, and as one of cuDNN's fused operations; last
convolutions as they are and filled up to multiples of 8 channels; a tower of a head step by step and as a CUDA graph;
JPEG files decoded on a core and on the device. Maps are those of 16 images of 800x1344, in bf16 and channels last.
Ways take turns; the median counts. Takes under 20 seconds; `--device cpu` runs a toy size.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, relu
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

Way = Callable[[], object]
Group = dict[str, Way]
LAST_WIDTHS = {"RetinaNet's boxes": 36, "FCOS's boxes": 4, "the RPN's scores": 3}


def maps(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Maps (B, C, H, W) of normal numbers."""
    drawn = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return drawn.contiguous(memory_format=torch.channels_last)


def with_gradients(way: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Way:
    """The way, and back; gradients are not added up, which all ways would pay for alike."""
    return lambda: torch.autograd.grad(way().sum(), leaves)


def norms(shape: tuple[int, ...], device: torch.device, *, trains: bool) -> Group:
    """A 3x3 convolution, its norm with running statistics, and a ReLU."""
    width = shape[1]
    pixels = maps(shape, device).requires_grad_(trains)
    weight = maps((width, width, 3, 3), device).requires_grad_(trains)
    norm = nn.BatchNorm2d(width).to(device).eval().requires_grad_(trains)
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None and running_var is not None

    def folded() -> tuple[Tensor, Tensor]:
        scale = norm.weight * torch.rsqrt(running_var + norm.eps)
        shift = norm.bias - running_mean * scale
        return (weight * scale.view(-1, 1, 1, 1)).bfloat16(), shift.bfloat16()

    ways: dict[str, Callable[[], Tensor]] = {
        "apart": lambda: relu(norm(conv2d(pixels, weight, padding=1)), inplace=True),
        "folded": lambda: relu(conv2d(pixels, *folded(), padding=1), inplace=True),
    }
    if trains:
        leaves = (pixels, weight, *norm.parameters())
        return {name: with_gradients(way, leaves) for name, way in ways.items()}
    if device.type == "cuda":  # it has no gradient
        ways["folded and fused by cuDNN"] = lambda: torch.cudnn_convolution_relu(
            pixels, *folded(), (1, 1), (1, 1), (1, 1), 1
        )
    return dict(ways)


def last_convolutions(shape: tuple[int, ...], device: torch.device, width: int) -> Group:
    """A head's last convolution, with its gradients, for `width` outputs at a place."""
    pixels = maps(shape, device).requires_grad_()
    weight = maps((width, shape[1], 3, 3), device).requires_grad_()
    more = -width % 8

    def filled_up() -> Tensor:
        return conv2d(pixels, pad(weight, (0, 0, 0, 0, 0, 0, 0, more)), padding=1)[:, :width]

    return {
        f"{width} outputs": with_gradients(lambda: conv2d(pixels, weight, padding=1), (pixels, weight)),
        f"{width + more}, of which {width} are taken": with_gradients(filled_up, (pixels, weight)),
    }


def towers(shape: tuple[int, ...], device: torch.device) -> Group:
    """Four convolutions of a head on the maps of a pyramid's levels, whose last ones are small; forward only."""
    batch, width, height, breadth = shape
    levels = [maps((batch, width, height >> level, breadth >> level), device) for level in range(5)]
    tower = nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True)))
    )
    tower = tower.to(device, torch.bfloat16).to(memory_format=torch.channels_last)

    def step() -> None:
        for level in levels:
            tower(level)

    ways: Group = {"step by step": step}
    if device.type == "cuda":
        with torch.no_grad():
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        ways["a CUDA graph"] = graph.replay
    return ways


def photos(count: int, device: torch.device) -> Group:
    """JPEG files of 480x640 as RGB."""
    smooth = nn.functional.interpolate(torch.rand(1, 3, 30, 40), size=(480, 640), mode="bicubic").clamp(0, 1)
    file = encode_jpeg((255 * smooth[0]).byte())
    ways: Group = {"on a core": lambda: [decode_jpeg(file, ImageReadMode.RGB) for _ in range(count)]}
    if device.type == "cuda":
        ways["on the device"] = lambda: decode_jpeg([file] * count, ImageReadMode.RGB, device=device)
    return ways


def milliseconds(way: Way, device: torch.device) -> float:
    """Wall time of the way."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def measure(title: str, build: Callable[[], Group], rounds: int, device: torch.device, *, trains: bool) -> list[str]:
    """Rows of a group; what a card cannot do is a row as well."""
    taken: dict[str, list[float]] = {}
    problems: dict[str, str] = {}
    try:
        ways = build()
    except RuntimeError as error:
        return [f"| {title} | {str(error).splitlines()[0][:120]} | | |"]
    with torch.set_grad_enabled(trains):
        for turn in range(rounds + 2):  # the first two find the fastest kernels
            for name in [name for name in ways if name not in problems]:
                try:
                    time_ms = milliseconds(ways[name], device)
                except RuntimeError as error:
                    taken.pop(name, None)
                    problems[name] = str(error).splitlines()[0][:120]
                    continue
                if turn >= 2:
                    taken.setdefault(name, []).append(time_ms)
    rows, first = [], next(iter(ways))
    for name in ways:
        if name in problems:
            rows.append(f"| {title} | {name} | {problems[name]} | |")
        else:
            time_ms = statistics.median(taken[name])
            share = f"{time_ms / statistics.median(taken[first]):.2f}" if first in taken else ""
            rows.append(f"| {title} | {name} | {time_ms:.3f} | {share} |")
    return rows


def main() -> None:
    """Measure every group, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    is_toy = arguments.device == "cpu"
    if not is_toy and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs a toy size")
    device = torch.device("cpu" if is_toy else "cuda:0")
    shape = (1, 8, 32, 32) if is_toy else (16, 256, 100, 168)
    middle = (1, 8, 16, 16) if is_toy else (16, 64, 200, 336)
    groups: list[tuple[str, Callable[[], Group], bool]] = [
        ("norm of a ResNet's c2, forward", lambda: norms(middle, device, trains=False), False),
        ("norm of 256 channels, forward", lambda: norms(shape, device, trains=False), False),
        ("norm of 256 channels, with gradients", lambda: norms(shape, device, trains=True), True),
        *((what, partial(last_convolutions, shape, device, width), True) for what, width in LAST_WIDTHS.items()),
        ("a head's tower", lambda: towers(shape, device), False),
        ("32 photos", lambda: photos(2 if is_toy else 32, device), False),
    ]
    torch.backends.cudnn.benchmark = True
    rows = ["| what | way | ms | of the first |", "|---|---|---|---|"]
    for title, build, trains in groups:
        rows += measure(title, build, arguments.rounds, device, trains=trains)
    name = "a CPU, toy size" if is_toy else torch.cuda.get_device_name(device)
    text = "\n".join([f"{name}, torch {torch.__version__}\n", *rows]) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "variants.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
