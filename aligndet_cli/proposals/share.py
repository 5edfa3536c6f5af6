"""Shares of a data set, for several processes that work on it at once (`--shard I/N`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.errors import ConfigError

MAX_COUNT = 500  # the last process has the files of all shares open at once
_NUM_NAMED = 10


@dataclass(frozen=True)
class Share:
    """Part `index` (1..count) of `count`: every count-th image, so that all shares take about equally long."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parse `I/N`.

        Raises:
            ConfigError: the text is not of this form, or I is not one of 1 to N.
        """
        parts = text.split("/")
        if len(parts) == 2 and all(part.isdecimal() for part in parts):
            index, count = map(int, parts)
            if 1 <= index <= count <= MAX_COUNT:
                return cls(index, count)
        raise ConfigError(f"--shard {text}: write it as I/N, from 1/N to N/N, N at most {MAX_COUNT}")

    def journal_in(self, folder: Path) -> Path:
        """Return the file for the finished images of this share."""
        return folder / f"{self.index}-of-{self.count}.log"

    def of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the (M,) positions in this share, of (N,) positions in the data set."""
        return positions[positions % self.count == self.index - 1]

    def mark_done(self, folder: Path) -> None:
        """Mark the share as done with a file; creating it also refreshes a network file system's view of the folder."""
        (folder / f"{self.index}-of-{self.count}.done").touch()

    def missing_shares(self, folder: Path) -> list[int]:
        """Return the indices of the shares that are not marked as done."""
        return [index for index in range(1, self.count + 1) if not (folder / f"{index}-of-{self.count}.done").exists()]


def describe_missing(missing: list[int]) -> str:
    """Describe missing shares by the first few indices, for people."""
    if not missing:
        return "none; another process puts them together"
    more = " ..." if len(missing) > _NUM_NAMED else ""
    return ", ".join(map(str, missing[:_NUM_NAMED])) + more


def describe_shards(folder: Path) -> str:
    """Describe how many shards are done, for people; empty if nobody has worked in shards."""
    counts = {int(file.stem.rpartition("-")[2]) for file in folder.glob("*-of-*.log")} - {1}
    shares = [Share(1, count) for count in sorted(counts)]
    return ", ".join(f"{share.count - len(share.missing_shares(folder))} of {share.count} shards" for share in shares)
