"""Plain ViTs in the files of JAX programs (SigLIP's big_vision, AugReg), beside what timm makes of the same file."""

import contextlib
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.backbones.layouts import FoundBackbone
from aligndet_cli.backbones.vit import PlainViT
from aligndet_cli.backbones.weights import fill_backbone, read_backbone
from aligndet_cli.errors import WeightsError

timm = pytest.importorskip("timm")

Arrays = dict[str, NDArray[np.float32]]
NAME = "timm:vit_tiny_patch16_224"
C, HEADS, BLOCKS, CELLS = 192, 3, 12, 14


@dataclass(frozen=True)
class Program:
    """How a program names the parts of a block, and where it keeps their network."""

    prefix: str
    attention: str
    perceptron: str
    second_norm: str
    positions: str


BIG_VISION = partial(Program, attention="0", perceptron="0", second_norm="1", positions="pos_embedding")
SIGLIP, ALONE = BIG_VISION("params/img/"), BIG_VISION("params/")
AUGREG = Program("", "1", "3", "2", "Transformer/posembed_input/pos_embedding")


def arrays_of(program: Program, *, num_blocks: int = BLOCKS, is_stacked: bool = False, num_classes: int = 0) -> Arrays:
    """Random arrays under the names and in the shapes of a file of a tiny ViT."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, dtype=np.float32)

    arrays = {"embedding/kernel": random(16, 16, 3, C), "embedding/bias": random(C), "cls": random(1, 1, C)}
    arrays |= {f"Transformer/encoder_norm/{kind}": random(C) for kind in ("scale", "bias")}
    arrays |= {program.positions: random(1, CELLS * CELLS + 1, C)}
    arrays |= {"head/kernel": random(C, num_classes), "head/bias": random(num_classes)} if num_classes else {}
    blocks = []
    for _ in range(num_blocks):
        attention, perceptron = (
            f"MultiHeadDotProductAttention_{program.attention}",
            f"MlpBlock_{program.perceptron}",
        )
        block = {
            f"LayerNorm_{norm}/{kind}": random(C) for norm in ("0", program.second_norm) for kind in ("scale", "bias")
        }
        for part in ("query", "key", "value"):
            block |= {f"{attention}/{part}/kernel": random(C, HEADS, C // HEADS)}
            block |= {f"{attention}/{part}/bias": random(HEADS, C // HEADS)}
        block |= {f"{attention}/out/kernel": random(HEADS, C // HEADS, C), f"{attention}/out/bias": random(C)}
        block |= {f"{perceptron}/Dense_0/kernel": random(C, 4 * C), f"{perceptron}/Dense_0/bias": random(4 * C)}
        blocks.append(
            block | {f"{perceptron}/Dense_1/kernel": random(4 * C, C), f"{perceptron}/Dense_1/bias": random(C)}
        )
    if is_stacked:
        arrays |= {f"Transformer/encoderblock/{part}": np.stack([one[part] for one in blocks]) for part in blocks[0]}
    else:
        arrays |= {f"Transformer/encoderblock_{i}/{part}": one[part] for i, one in enumerate(blocks) for part in one}
    return {f"{program.prefix}{name}": value for name, value in arrays.items()}


def filled(file: Path) -> tuple[PlainViT, FoundBackbone]:
    backbone, found = build_backbone(BackboneConfig(name=NAME)), read_backbone(file, NAME)
    assert isinstance(backbone, PlainViT)
    fill_backbone(backbone, found, file)
    return backbone, found


OF_SIGLIP = {"params/t": np.ones(1, np.float32), "params/img/MAPHead_0/probe": np.ones((1, 1, C), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "others"),
    [
        (arrays_of(SIGLIP) | OF_SIGLIP, tuple(OF_SIGLIP)),
        (arrays_of(ALONE, is_stacked=True), ()),
        (arrays_of(AUGREG, num_classes=1000), ("head/kernel", "head/bias")),
    ],
    ids=["SigLIP", "stacked", "AugReg"],
)
def test_every_tensor_is_what_timm_makes_of_it(arrays: Arrays, others: tuple[str, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **arrays)
    backbone, found = filled(tmp_path / "vit.npz")
    assert found.others == others and found.is_supervised == ("head/kernel" in arrays)
    reference = timm.create_model(NAME.removeprefix("timm:"))
    with contextlib.redirect_stdout(io.StringIO()):
        reference.load_pretrained(str(tmp_path / "vit.npz"))
    for name, value in reference.state_dict().items():
        assert name.startswith("head") or torch.equal(backbone.body.state_dict()[name], value), name


def test_two_bytes_without_a_type_are_bfloat16(tmp_path: Path) -> None:
    arrays = arrays_of(SIGLIP)
    bias = "params/img/embedding/bias"
    expected = torch.from_numpy(arrays[bias]).bfloat16()
    np.savez(tmp_path / "vit.npz", **{**arrays, bias: expected.view(torch.int16).numpy().view("V2")})
    backbone, _ = filled(tmp_path / "vit.npz")
    assert torch.equal(backbone.body.patch_embed.proj.bias, expected.float())


def test_other_networks_and_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "vit.npz"
    np.savez(file, **arrays_of(SIGLIP, num_blocks=BLOCKS + 1))
    with pytest.raises(
        WeightsError, match=r"do not fit timm:vit_tiny.*: 12 of \d+ tensors too many: body.blocks.12.norm1"
    ):
        filled(file)
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"vit.npz: not a readable NumPy file, or damaged \(.*\); get it again$"):
        filled(file)
    np.savez(file, a=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match=r"vit.npz: not a readable NumPy file, or damaged \(Object arrays cannot be"):
        filled(file)
