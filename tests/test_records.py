"""Records and files beside them: whole or not at all, and devices stay devices."""

import os
import stat
import threading

import pytest

from quantkit.errors import OutputError
from quantkit.records import check_output, new_record, write_bytes, write_record, write_text


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


def test_whether_a_file_can_be_written_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for name in ("new", "not/yet/there", "file", "pipe"):
        check_output(tmp_path / name)
    for name in (".", "file/below", "n" * 300):
        with pytest.raises(OutputError, match="cannot be written"):
            check_output(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_record_is_json_without_nan(tmp_path):
    with pytest.raises(OutputError, match="not finite"):
        write_record(tmp_path / "record.json", new_record("perplexity", {"nll": float("nan")}))
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(OutputError, match="Is a directory"):
        write_text(tmp_path, "text")
