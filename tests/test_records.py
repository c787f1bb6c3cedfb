"""Records and files beside them: whole or not at all, and devices stay devices."""

import os
import stat
import threading

import pytest

from quantkit.errors import OutputError
from quantkit.records import write_bytes, write_text


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path):
    out = tmp_path / "made" / "file.txt"
    write_text(out, "old")
    write_text(out, "new")
    assert out.read_text() == "new"
    assert list(out.parent.iterdir()) == [out]


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"content")
    reader.join()
    assert received == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(OutputError, match="Is a directory"):
        write_text(tmp_path, "text")
