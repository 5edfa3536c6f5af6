import errno
import fcntl
import io
import struct
from dataclasses import replace

import numpy as np
import pytest

from aligndet_cli.errors import RunError
from aligndet_cli.proposals.journal import ImageResult, Journal, Journals


def found(position: int, num_boxes: int = 3, reason: str = "") -> ImageResult:
    boxes = np.arange(4 * num_boxes, dtype=np.float32).reshape(-1, 4) + 100 * position
    return ImageResult(position, (83, 127 + position), boxes, 2**64 - 1 - position, reason)


def write(file, *entries: ImageResult) -> None:
    with Journal.open(file) as journal:
        for entry in entries:
            journal.append(entry)


def test_what_was_appended_is_read_in_order_of_position(tmp_path):
    write(tmp_path / "1-of-2.log", found(4), found(0, num_boxes=0), found(2, num_boxes=0, reason="größer: broken"))
    write(tmp_path / "2-of-2.log", found(3, num_boxes=257))
    records = Journals(tmp_path, 7)
    assert records.missing().tolist() == [1, 5, 6]
    assert records.missing(skipped_too=True).tolist() == [1, 2, 5, 6]
    for read, expected in zip(
        records.in_order(), [found(0, 0), found(2, 0, "größer: broken"), found(3, 257), found(4)], strict=True
    ):
        np.testing.assert_array_equal(read.boxes, expected.boxes)
        assert (read.position, read.size_hw, read.digest) == (expected.position, expected.size_hw, expected.digest)
        assert read.reason == expected.reason


def test_the_last_bytes_of_a_disk_take_a_part_of_a_record_and_the_error_names_the_file(tmp_path, monkeypatch):
    class Small(io.FileIO):
        def write(self, data):
            self.left = getattr(self, "left", 200)
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = bytes(data)[: min(7, self.left)]
            self.left -= len(part)
            return super().write(part)

    file = tmp_path / "1-of-1.log"
    monkeypatch.setattr(type(file), "open", lambda path, mode, buffering=-1: Small(path, mode.replace("b", "")))
    with pytest.raises(OSError, match="1-of-1.log"):
        write(file, found(0), found(1), found(2))
    monkeypatch.undo()
    assert [entry.position for entry in Journals(tmp_path, 3).in_order()] == [0, 1]


def test_origins_are_kept_beside_the_boxes(tmp_path):
    origins = np.arange(6, dtype=np.float32).reshape(3, 2)
    with_boxes = replace(found(1), origins=origins)
    with Journal.open(tmp_path / "1-of-1.log", with_origins=True) as journal:
        for entry in (with_boxes, found(0, num_boxes=0, reason="broken")):
            journal.append(entry)
    size = (tmp_path / "1-of-1.log").stat().st_size
    with Journal.open(tmp_path / "1-of-1.log", with_origins=True):  # finds nothing to cut off
        assert (tmp_path / "1-of-1.log").stat().st_size == size
    left_out, read = Journals(tmp_path, 2, with_origins=True).in_order()
    np.testing.assert_array_equal(read.boxes, with_boxes.boxes)
    np.testing.assert_array_equal(read.origins, origins)
    assert (left_out.reason, left_out.origins) == ("broken", None)


def test_cut_anywhere_it_keeps_what_is_whole_and_goes_on(tmp_path):
    file = tmp_path / "1-of-1.log"
    write(file, found(0))
    first = file.stat().st_size
    write(file, found(1))
    content = file.read_bytes()
    for size in range(len(content) + 1):
        file.write_bytes(content[:size])
        num_whole = (size >= first) + (size == len(content))
        assert len(list(Journals(tmp_path, 3).in_order())) == num_whole
        write(file, found(2))
        assert len(file.read_bytes()) == (0, first, len(content))[num_whole] + first
        assert [entry.position for entry in Journals(tmp_path, 3).in_order()] == [*range(num_whole), 2]


def test_damaged_bytes_end_the_file(tmp_path):
    file = tmp_path / "1-of-1.log"
    write(file, found(0), found(1), found(2))
    content = file.read_bytes()
    record = len(content) // 3
    for place in range(record, 2 * record):
        file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        assert Journals(tmp_path, 3).missing().tolist() == [1, 2]
    # After a loss of power a file can end in zeros; and a size that makes no sense asks for no memory.
    for tail in (bytes(1000), struct.pack("<IIIIIQQ", 0, 2**32 - 1, 2**32 - 1, 1, 1, 1, 1)):
        file.write_bytes(content[:record] + tail)
        assert Journals(tmp_path, 3).missing().tolist() == [1, 2]


def test_an_image_done_twice_is_read_where_it_was_not_left_out(tmp_path):
    write(tmp_path / "1-of-2.log", found(0, 0, "broken"), found(1))
    write(tmp_path / "2-of-2.log", found(0), found(1, 0, "broken"))
    assert [entry.reason for entry in Journals(tmp_path, 2).in_order()] == ["", ""]


def test_only_one_process_writes_a_journal(tmp_path):
    write(tmp_path / "1-of-2.log", found(0))
    with (tmp_path / "1-of-2.log").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"1-of-2: another aligndet process"), Journal.open(tmp_path / "1-of-2.log"):
            pass
    assert Journals(tmp_path, 1).missing().size == 0
