"""Stand-ins for the libraries of loggers, which are not installed here."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

OTHERS = ("wandb", "mlflow", "trackio")
Calls = list[tuple[str, Any]]


def stand_in(name: str, calls: Calls, fails_at: str | None = None) -> ModuleType:
    """A module whose functions only write down what they are called with."""
    module = ModuleType(name)

    def noting(function: str) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            if function == fails_at:
                raise ConnectionError(f"no route to {name}\nand more")
            print(f"{name} speaks")  # stdout is the command's
            calls.append((function, values[0] if values else named))
            if function in ("log", "log_metrics", "finish", "end_run"):
                calls[-1] = (function, values[0] if values else {}, named)  # type: ignore[assignment]
            if function == "init":
                summary = SimpleNamespace(update=noting("summary"))
                return SimpleNamespace(log=noting("log"), finish=noting("finish"), summary=summary)
            return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

        return call

    functions = ("init", "log", "finish", "set_experiment", "start_run", "log_params", "log_metrics", "set_tags")
    for function in (*functions, "end_run"):
        setattr(module, function, noting(function))
    return module
