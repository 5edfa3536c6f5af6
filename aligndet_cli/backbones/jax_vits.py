"""Names of plain ViTs in the files of Google's JAX programs, `.npz`: of big_vision, which SigLIP is from, and others.

Source: `models/vit.py` of big_vision and `vit_jax/models_vit.py` of vision_transformer, both of google-research.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aligndet_cli.backbones.plain import Tensors
from aligndet_cli.backbones.vit_layouts import Named

# Where a ViT lies: in a SigLIP, alone, beside its optimizer.
_OUTER = ("params/img/", "params/", "opt/target/", "")
_FIRST = "embedding/kernel"
_BLOCKS = "Transformer/encoderblock"
# big_vision counts the parts of a block by kind, vision_transformer all of them together.
_NAMES = (
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"cls", r"cls_token"),
    (r"(?:Transformer/posembed_input/)?pos_embedding", r"pos_embed"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
    (rf"{_BLOCKS}_(\d+)/LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (rf"{_BLOCKS}_(\d+)/LayerNorm_[12]/(scale|bias)", r"blocks.\1.norm2.\2"),
    (rf"{_BLOCKS}_(\d+)/MultiHeadDotProductAttention_[01]/out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCKS}_(\d+)/MlpBlock_[03]/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCKS}_(\d+)/MlpBlock_[03]/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
)
_QKV = rf"{_BLOCKS}_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/(kernel|bias)"


def of_jax(tensors: Tensors) -> Named | None:
    """Return a ViT of JAX under timm's names and in its shapes; None: it is none."""
    prefix = next((one for one in _OUTER if one + _FIRST in tensors), None)
    if prefix is None:
        return None
    found, parts = Named({}, {}), defaultdict[str, dict[str, tuple[str, Tensor]]](dict)
    for name, bare, value in _by_block(tensors, prefix):
        if of_attention := re.fullmatch(_QKV, bare):
            number, part, kind = of_attention.groups()
            parts[f"blocks.{number}.attn.qkv.{kind}"][part] = name, value
        elif new := _new_name(bare):
            parts[new][""] = name, value
    for new, by_part in parts.items():
        names, values = zip(*(by_part[part] for part in ("", "query", "key", "value") if part in by_part), strict=True)
        key = re.sub(r"\.(kernel|scale)$", ".weight", new)
        found.tensors[key], found.sources[key] = _as_in_timm(new, values), names
    return found


def _by_block(tensors: Tensors, prefix: str) -> Iterator[tuple[str, str, Tensor]]:
    """Yield names in the file, names without what is around the ViT, and tensors; those of all blocks one by one."""
    for name, value in tensors.items():
        bare = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if bare.startswith(f"{_BLOCKS}/"):
            for number, one in enumerate(value):
                yield name, bare.replace(_BLOCKS, f"{_BLOCKS}_{number}", 1), one
        else:
            yield name, bare, value


def _new_name(bare: str) -> str | None:
    for pattern, new in _NAMES:
        if match := re.fullmatch(pattern, bare):
            return match.expand(new)
    return None


def _as_in_timm(name: str, values: Sequence[Tensor]) -> Tensor:
    """Return one tensor in timm's shape; `values` is one, or those of queries, keys and values.

    There a convolution is (rows, columns, in, out) and a matrix (in, out); attention has heads apart, so that queries,
    keys and values are (in, heads, out) and what leads out of it is (heads, in, out).
    """
    is_kernel = name.endswith(".kernel")
    if ".qkv." in name:
        return torch.cat([one.flatten(1).T if is_kernel else one.flatten() for one in values])
    (value,) = values
    if not is_kernel:
        return value
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.flatten(0, -2).T
