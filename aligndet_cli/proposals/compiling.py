"""Loops over pixels and regions at the speed of C: one decorator, so that one place knows numba."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call, keep the result on disk, and release the interpreter's lock while it runs.

    The result is kept beside the package, or in the user's cache folder where that is read-only; where neither can be
    written it lasts as long as the process. `NUMBA_CACHE_DIR` names another folder. Division by zero gives what NumPy
    gives, since a check before each division costs a tenth of the time.
    """
    try:
        return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # no folder for the cache
        return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))
