"""The decorator that compiles loops over pixels, regions and RoIs; the only module that knows numba."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function at its first call, cache the result on disk, and release the interpreter's lock in it.

    The cache is beside the package, or in the user's cache folder if the package is read-only; if neither can be
    written, the result lasts as long as the process. `NUMBA_CACHE_DIR` names another folder. Division by zero follows
    NumPy, since checking every division costs a tenth of the time.
    """
    try:
        return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # no folder for the cache
        return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))
