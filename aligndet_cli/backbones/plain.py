"""Reading of weights files of any program as plain data; code in them is never run.

Every reader of weights begins here: backbones, whole detectors, and our own `weights.pt`.
"""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from aligndet_cli.errors import WeightsError

Tensors = dict[str, Tensor]

# Keys under which programs keep a network in a file, weights before their averages; "" is the file itself.
_TRAINED = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "online_backbone",
)
_AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "teacher")
WRAPPERS = (*_TRAINED, "", *_AVERAGED)
_DEPTH = 4  # of wrappers in each other
# Parts of names that DistributedDataParallel and torch.compile add, and the name of the network in a training module.
_ADDED, _OUTER = ("module", "_orig_mod"), "model"
_COUNTER = "n_averaged"  # of torch's AveragedModel


class _Inert:
    """Stand-in for an object beside the weights: it is made without running any code of its class."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Kind:
    """Stand-in for the dtype of a NumPy scalar."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else ""

    def value(self, data: Any) -> Any:
        """Return bytes as a number or text; None for other kinds."""
        if re.fullmatch(r"[biufcU]\d+", self.code) is None or not isinstance(data, bytes):
            return None
        return np.frombuffer(data, np.dtype(self.order + self.code))[0].item()


def _scalar(kind: Any, data: Any = None) -> Any:
    return kind.value(data) if isinstance(kind, _Kind) else None


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


# Data that training programs save beside the weights, and the built-in names in it.
_PLAIN: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Kind, "numpy.dtype"),
    *(
        (_Inert, name)
        for name in (
            *("numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
            *("argparse.Namespace", "types.SimpleNamespace"),
            *("datetime.datetime", "datetime.date", "datetime.timedelta"),
            *(f"pathlib.{local}{system}Path" for local in ("", "_local.") for system in ("Posix", "Windows")),
            *(f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "getattr")),
            "mmengine.logging.history_buffer.HistoryBuffer",
        )
    ),
    (_empty, "collections.defaultdict"),
    *(
        (OrderedDict, name)
        for name in (
            *("yacs.config.CfgNode", "addict.addict.Dict"),
            *("mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict"),
            *(f"{name}.AttributeDict" for name in ("pytorch_lightning.utilities.parsing",)),
            *(f"{name}.utilities.data.AttributeDict" for name in ("lightning_fabric", "lightning.fabric")),
        )
    ),
]


def read_plain(file: Path, title: str) -> Any:
    """Return the content of a PyTorch, safetensors or NumPy file (`.npz`), with tensors on the CPU.

    Args:
        title: start of messages, which names the file.

    Raises:
        WeightsError: the file is missing or damaged, or holds more than plain data; the message names it.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise WeightsError(f"{title}: a pipe or a device, which cannot be read twice; copy it into a file first")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".npz":
            return _load_arrays(file)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{title}: no such file") from None
    except IsADirectoryError:
        raise WeightsError(f"{title}: is a folder; name a file in it") from None
    except PermissionError:
        raise WeightsError(f"{title}: may not be read; change its permissions") from None
    except OSError as error:
        if error.errno is None:
            raise WeightsError(f"{title}: {_explain(file, error)}") from None
        raise WeightsError(f"{title}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise WeightsError(f"{title}: {_explain(file, error)}") from None


def _load_arrays(file: Path) -> Tensors:
    """Return the arrays of numbers in a NumPy file; bfloat16, which NumPy has not, lies there as two bytes."""
    found = {}
    with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if array.dtype == np.dtype("V2"):
                found[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif array.dtype.kind in "fiu":
                found[name] = torch.from_numpy(array)
    return found


def _explain(file: Path, error: Exception) -> str:
    """Return the reason why a file cannot be read, and the way out."""
    told = str(error)
    if code := re.search(r"GLOBAL (\S+)", told) or re.search(r"(TorchScript) archive", told):
        return (
            f"not a readable PyTorch file of plain tensors (it holds {code[1]}, which is code); save just the model's "
            "state_dict() with torch.save, where it was made"
        )
    start = b""
    with contextlib.suppress(OSError), file.open("rb") as handle:
        start = handle.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "not a readable PyTorch file, but the pointer that Git LFS keeps in its place; run `git lfs pull` there"
    kind = {".safetensors": "safetensors", ".npz": "NumPy"}.get(file.suffix, "PyTorch")
    reason = re.split(r"\n|\. ", told, maxsplit=1)[0].strip() or type(error).__name__
    return f"not a readable {kind} file, or damaged ({reason}); get it again"


def state_dicts(content: Any, depth: int = _DEPTH) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Yield the networks in a file: the keys they lie under, and their tensors by bare name; the likeliest first."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    for key in WRAPPERS:
        if key:
            for keys, tensors in state_dicts(content.get(key), depth - 1):
                yield (key, *keys), tensors
        elif own := {bare_name(name): value for name, value in content.items() if _is_weight(name, value)}:
            yield (), own


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and is_dense(value) and name != _COUNTER


def is_dense(value: Any) -> bool:
    """Return True for a tensor that is not sparse."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def bare_name(name: str) -> str:
    """Return the name of a tensor without what DistributedDataParallel, torch.compile and training modules add."""
    parts = [part for part in name.split(".") if part not in _ADDED]
    while len(parts) > 1 and parts[0] == _OUTER:
        parts = parts[1:]
    return ".".join(parts)


def require_finite(tensors: Iterable[tuple[str, Tensor]], title: str) -> None:
    """Make sure that weights are numbers.

    Raises:
        WeightsError: a tensor holds NaN or infinity; the message begins with `title` and names the tensor.
    """
    for name, value in tensors:
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise WeightsError(f"{title}: '{name}' holds NaN or infinity, so nothing can come of it; use another file")
