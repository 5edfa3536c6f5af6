"""The Hugging Face Hub: weights to and from it, only where a name says `hub:`. Needs the extra `hub`."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aligndet_cli.config import env_switch
from aligndet_cli.errors import ConfigError, RunError, WeightsError

PREFIX = "hub:"
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_on_hub(name: object) -> bool:
    """Return True if a name says that it is one of the Hub, `hub:OWNER/NAME`."""
    return isinstance(name, str) and name.startswith(PREFIX)


def fetch_weights(name: str, *, file: str = "weights.pt", offline: bool | None = None) -> Path:
    """Return weights of the Hub as a file in its cache; downloads them if they are not there.

    Args:
        name: `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION`.
        file: their file in the repository.
        offline: take them from the cache alone; None: as ALIGNDET_OFFLINE says.

    Raises:
        ConfigError: no such name, or `huggingface_hub` is missing.
        WeightsError: there are no such weights, or they are not in the cache and must not be downloaded.
    """
    repository, revision = _parse(name)
    hub = _import()
    is_offline = env_switch("ALIGNDET_OFFLINE") if offline is None else offline
    try:
        found = hub.hf_hub_download(repository, file, revision=revision, local_files_only=is_offline)
    except hub.errors.LocalEntryNotFoundError:
        where = "and no download is allowed (ALIGNDET_OFFLINE)" if is_offline else "and the Hub is out of reach"
        raise WeightsError(f"{name}: {file} is not in the cache of the Hub, {where}") from None
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise WeightsError(f"{name}: {_first_line(error)}") from None
    return Path(found)


def push_files(name: str, files: Mapping[str, Path | bytes], message: str, *, is_private: bool = False) -> str:
    """Make a repository of the Hub, if it is not there, and put files into it as one commit; return its address.

    Args:
        name: `hub:OWNER/NAME`.
        files: paths or contents by their names in the repository.

    Raises:
        ConfigError: no such name, nobody is logged in, offline, or `huggingface_hub` is missing.
        RunError: the Hub refuses, or is out of reach.
    """
    repository, revision = _parse(name)
    hub = _import()
    if env_switch("ALIGNDET_OFFLINE"):
        raise ConfigError(f"{name}: nothing is sent while ALIGNDET_OFFLINE is set")
    if hub.get_token() is None:
        raise ConfigError(f"{name}: who are you there? log in with `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    operations = [hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    with _told(name, hub):
        address = api.create_repo(repository, private=is_private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(address)


@contextlib.contextmanager
def _told(name: str, hub: Any) -> Iterator[None]:
    try:
        yield
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise RunError(f"{name}: {_first_line(error)}") from None
    except Exception as error:
        if "ConnectError" not in type(error).__name__ and "Timeout" not in type(error).__name__:
            raise
        raise RunError(f"{name}: the Hub is out of reach ({_first_line(error)})") from None


def _parse(name: str) -> tuple[str, str | None]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name}: write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION")
    return found[1], found[2]


def _import() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError("hub: needs huggingface_hub: pip install 'aligndet[hub]'") from None
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
