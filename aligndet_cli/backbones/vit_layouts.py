"""Names of plain ViTs in files that timm does not convert: those of Hugging Face's transformers, and chunked blocks.

Source: the converters in transformers (`convert_dinov2_to_hf.py`, `convert_dinov3_vit_to_hf.py`,
`convert_vit_mae_to_pytorch.py`, `convert_siglip_to_hf.py`), read backwards, and facebookresearch's
`dinov2/models/vision_transformer.py`, whose chunks keep the numbers of their blocks.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch

from aligndet_cli.backbones.plain import Tensors

# Where transformers keeps a ViT: alone, or in a model with a head, a decoder or a text tower.
_OUTER = ("", "vit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.", "vision_model.")
_FIRST = r"embeddings\.patch_embedding.*\.weight"
_NAMES = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embeddings|patch_embedding)\.(\w+)", r"patch_embed.proj.\1"),
    (r"(?:norm|layernorm|post_layernorm)\.(\w+)", r"norm.\1"),
)
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
_ATTENTION = r"(?:attention\.attention|attention|self_attn)"
_PARTS = (
    (r"(?:norm|layernorm_|layer_norm)(?:1|before)\.(\w+)", r"norm1.\1"),
    (r"(?:norm|layernorm_|layer_norm)(?:2|after)\.(\w+)", r"norm2.\1"),
    (_ATTENTION + r"\.(?:query|q_proj)\.(\w+)", r"attn.q.\1"),
    (_ATTENTION + r"\.(?:key|k_proj)\.(\w+)", r"attn.k.\1"),
    (_ATTENTION + r"\.(?:value|v_proj)\.(\w+)", r"attn.v.\1"),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(\w+)", r"attn.proj.\1"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"(?:mlp\.fc1|mlp\.up_proj|intermediate\.dense)\.(\w+)", r"mlp.fc1.\1"),
    (r"(?:mlp\.fc2|mlp\.down_proj|output\.dense)\.(\w+)", r"mlp.fc2.\1"),
    (r"mlp\.weights_in\.(\w+)", r"mlp.w12.\1"),
    (r"mlp\.weights_out\.(\w+)", r"mlp.w3.\1"),
    (r"mlp\.gate_proj\.(\w+)", r"mlp.gate.\1"),
)


@dataclass(frozen=True)
class Named:
    """Tensors under other names than in their file.

    Attributes:
        sources: names in the file, by the new name.
    """

    tensors: Tensors
    sources: dict[str, tuple[str, ...]]


def as_they_are(tensors: Tensors, prefix: str = "") -> Named:
    """Return the tensors whose names begin with `prefix`, without that."""
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    return Named({new: tensors[name] for new, name in names.items()}, {new: (name,) for new, name in names.items()})


def without_chunks(named: Named) -> Named:
    """Return tensors with blocks `blocks.N` where DINOv2's training has `blocks.CHUNK.N`."""
    if not any(re.match(r"blocks\.\d+\.\d+\.", name) for name in named.tensors):
        return named
    new = {name: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name) for name in named.tensors}
    return Named(
        {new[name]: value for name, value in named.tensors.items()},
        {new[name]: names for name, names in named.sources.items()},
    )


def of_transformers(tensors: Tensors) -> Named | None:
    """Return a DINOv2, DINOv3, MAE or SigLIP of transformers under the names of their own code; None: it is none."""
    prefix = next((one for one in _OUTER if any(re.fullmatch(re.escape(one) + _FIRST, name) for name in tensors)), None)
    if prefix is None:
        return None
    renamed = {name: new for name in tensors if (new := _new_name(name, prefix))}
    has_gate = any(".gate." in new for new in renamed.values())
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, new in renamed.items():
        whole, part = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", new), re.search(r"\.attn\.([qkv])\.", new)
        parts[_swiglu(whole) if has_gate else whole][part[1] if part else ""] = name
    named = Named({}, {new: tuple(by_part.values()) for new, by_part in parts.items()})
    for new, by_part in parts.items():
        named.tensors[new] = _fused(tensors, by_part)
    if "pos_embed" in named.tensors:
        named.tensors["pos_embed"] = named.tensors["pos_embed"].reshape(1, *named.tensors["pos_embed"].shape[-2:])
    elif "register_tokens" in named.tensors:  # DINOv3 has rotary positions, and another word
        named.tensors["storage_tokens"] = named.tensors.pop("register_tokens")
        named.sources["storage_tokens"] = named.sources.pop("register_tokens")
    return named


def _new_name(name: str, prefix: str) -> str | None:
    bare = name.removeprefix(prefix)
    block = re.match(_BLOCK, bare)
    rules, rest = (_PARTS, bare[block.end() :]) if block else (_NAMES, bare)
    for pattern, new in rules:
        if name.startswith(prefix) and (match := re.fullmatch(pattern, rest)):
            return (f"blocks.{block[1]}." if block else "") + match.expand(new)
    return None


def _swiglu(name: str) -> str:
    """Return the name of a layer in DINOv3's gated perceptron, whose three layers have numbers."""
    return name.replace(".mlp.gate.", ".mlp.w1.").replace(".mlp.fc1.", ".mlp.w2.").replace(".mlp.fc2.", ".mlp.w3.")


def _fused(tensors: Tensors, by_part: dict[str, str]) -> torch.Tensor:
    """Return the one tensor, or those of queries, keys and values below each other; DINOv3's keys have no bias."""
    if "" in by_part:
        return tensors[by_part[""]]
    one = tensors[next(iter(by_part.values()))]
    return torch.cat([tensors[by_part[part]] if part in by_part else torch.zeros_like(one) for part in "qkv"])
