"""The logger, and the display of progress: a bar on a terminal, plain lines that become fewer elsewhere."""

import errno
import io
import logging
import os
import re
import sys
import textwrap
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

ProgressMode = Literal["auto", "bar", "plain", "none"]

logger = logging.getLogger("aligndet")

# Seconds between plain lines, in the first minute and later.
_FIRST_MINUTE, _OFTEN, _SELDOM = 60.0, 5.0, 60.0
_BAR, _WIDE = 20, 80  # columns of the bar, and of the narrowest terminal that has one


def setup_logging(verbosity: int) -> None:
    """Send the package's log to stderr: -1 warnings only, 0 information, 1 debugging."""
    make_streams_sturdy()
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    logger.handlers[:] = [_Lines(sys.stderr)]
    logger.setLevel(level)
    logger.propagate = False
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where its cache is, is no concern of ours


def make_streams_sturdy() -> None:
    """Let stdout and stderr of this process write any text, and end quietly where nobody listens any more.

    What cannot be written on stderr is dropped: there is no place to tell it, and no reason to end a run. Of stdout,
    the first such error is raised, unless it is that the reader of a pipe is gone.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper) and _is_original(stream, number):
            stream.flush()
            buffer = io.BufferedWriter(_SturdyFile(name, number))
            sturdy = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, sturdy)


def _is_original(stream: io.TextIOWrapper, number: int) -> bool:
    """Return True if a stream writes to that file descriptor, and not yet through a `_SturdyFile`."""
    try:
        return stream.fileno() == number and not isinstance(getattr(stream.buffer, "raw", None), _SturdyFile)
    except (OSError, ValueError):  # captured by a test, or closed
        return False


class _SturdyFile(io.FileIO):
    """A file descriptor of which only the first error is raised, if any."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._title, self._is_broken = name, False

    def write(self, data: "Buffer", /) -> int:
        count = memoryview(data).nbytes
        if self._is_broken:
            return count
        try:
            return super().write(data)
        except OSError as error:
            self._is_broken = True
            if self._title == "stderr" or error.errno == errno.EPIPE:
                return count
            raise OSError(error.errno, error.strerror, self._title) from None


class _Lines(logging.StreamHandler[TextIO]):
    """Lines of the log: above a bar while there is one, and folded on a terminal, but for commands to copy.

    Attributes:
        bar: console of the bar that is shown.
    """

    bar: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.bar is None:
            super().emit(record)
        else:  # at the end of its line, a message would leave the bar behind
            self.bar.print(Text(self.format(record)), soft_wrap=True)

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = prefix + record.getMessage()
        if not self.stream.isatty() or text.startswith("next: "):
            return text
        width = Console(stderr=True).width
        return "\n".join(fold(line, width) for line in text.splitlines())


def fold(line: str, width: int, indent: int | None = None) -> str:
    """Break a line between words where it is too long.

    Args:
        indent: blanks before all but the first line; by default the width of an indented name and the gap behind it.
    """
    if cell_len(line) <= width:
        return line
    if indent is None:
        name = re.match(r" +\S.*? {2,}", line)
        indent = len(name[0]) if name else 0
    indent = indent if indent <= width // 2 else 0
    rest = textwrap.wrap(line[indent:], width - indent, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join([line[:indent] + rest[0], *rest[1:]])


def _handlers() -> list[_Lines]:
    return [handler for handler in logger.handlers if isinstance(handler, _Lines)]


def resolve_progress_mode(mode: ProgressMode, stream: TextIO) -> ProgressMode:
    """Replace `auto` by `bar` on a real terminal and by `plain` in CI, files, pipes and dumb terminals."""
    if mode != "auto":
        return mode
    is_interactive = stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return "bar" if is_interactive else "plain"


class Progress:
    """A display of units done, speed, time left, and fields such as losses.

    Args:
        title: name of the work, e.g. `proposals`.
        total: number of units.
        unit: plural of one unit, e.g. `images`, `steps`.
        start: units done by an earlier, interrupted run; not counted in the speed.
        mode: see `resolve_progress_mode`; `none` shows nothing (also for ranks other than the main one).
        first: name of the field that is shown before the speed; others follow, on a terminal as many as there is room
            for.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "images",
        *,
        start: int = 0,
        mode: ProgressMode = "auto",
        first: str = "",
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.start = start, start
        self.mode = resolve_progress_mode(mode, sys.stderr)
        self.first = first
        self._bar: RichProgress | None = None
        self._fields: dict[str, str] = {}
        self._shown = -1

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        if self.mode == "bar":
            console = Console(stderr=True)
            whole = Column(no_wrap=True)
            self._room = console.width - len(f"{self.title} {self.total}/{self.total} eta 0:00:00 ")
            bar: tuple[ProgressColumn, ...] = ()
            if console.width >= _WIDE:
                bar = (BarColumn(bar_width=_BAR, table_column=Column(min_width=_BAR)),)
                self._room -= _BAR + 1
            columns = (
                TextColumn("{task.description}", table_column=whole),
                *bar,
                MofNCompleteColumn(table_column=whole),
                _TimeLeft(table_column=whole),
                TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            )
            self._bar = RichProgress(*columns, console=console, transient=False, expand=True)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, text="")
            self._bar.start()
            for handler in _handlers():
                handler.bar = console
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text(self._room))
            self._bar.stop()
            for handler in _handlers():
                handler.bar = None
        elif self.mode == "plain" and kind is None and self._shown != self.done:
            self._line()

    def advance(self, count: int = 1, **fields: float | str) -> None:
        """Count `count` more units as done; `fields` are shown beside them (numbers with three digits)."""
        self.done += count
        if fields:
            self._fields = {key: f"{key} {_short(value)}" for key, value in fields.items()}
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text(self._room))
        elif self.mode == "plain" and self._is_due(time.monotonic()):
            self._line()

    def _is_due(self, now: float) -> bool:
        return now - self._last_line >= (_OFTEN if now - self._began < _FIRST_MINUTE else _SELDOM)

    @property
    def rate(self) -> float:
        """Units per second since this run began."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def _text(self, room: int | None = None) -> str:
        """Return speed and fields, as many of them whole as `room` characters hold; the first is always there."""
        parts = [text for key, text in self._fields.items() if key == self.first]
        parts.append(self._speed(room))
        parts += [text for key, text in self._fields.items() if key != self.first]
        text = parts[0]
        for part in parts[1:]:
            if room is not None and len(f"{text}  {part}") > room:
                break
            text += f"  {part}"
        return text

    def _speed(self, room: int | None) -> str:
        """Return units per second; without their name, if `room` has only space for the number."""
        rate = _short(self.rate)
        named = f"{rate} {self.unit}/s"
        return named if room is None or len(named) <= room else f"{rate}/s"

    def _line(self) -> None:
        self._last_line, self._shown = time.monotonic(), self.done
        left = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        eta = f"  eta {clock(left)}" if self.done < self.total and self.rate > 0 else ""
        print(f"{self.title}: {self.done}/{self.total} {self.unit}{eta}  {self._text()}".rstrip(), file=sys.stderr)
        sys.stderr.flush()


class _TimeLeft(TimeRemainingColumn):
    """Time left, said to be that."""

    def render(self, task: Task) -> Text:
        return Text("eta ") + super().render(task)


def _short(value: float | str) -> str:
    """Return a number with three digits, such as `0.532` or `1,540,000`."""
    if isinstance(value, str):
        return value
    rounded = f"{value:.3g}"
    return f"{float(rounded):,.0f}" if 1e3 <= abs(value) < 1e7 else rounded


def duration(seconds: float) -> str:
    """Format a duration in words: `0.4 s`, `36 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(seconds: float) -> str:
    """Format a duration as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
