import json
import socket
import subprocess
import sys

import pytest

from conftest import ROOT
from processes import files_of_at_most
from trl_perce.utils.files import (
    is_disk_error,
    read_lines,
    whole_lines,
    write_json,
    write_json_lines,
    write_text,
    written_whole,
)


HOSTILE = "a\u2028b\x85c\ud83d \U0001f600 \0 é\r\nend"  # line ends that are none in JSON, half a character, a zero


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), written_whole(path) as part:
        part.write_text("new")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json_lines(path, [{"fine": 1}, {"not": object()}])
    assert path.read_text() == "old" and [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_disk_errors_are_told_from_others(tmp_path):
    with files_of_at_most(1000), pytest.raises(OSError) as full:
        write_text(tmp_path / "file.txt", "x" * 2000)
    with pytest.raises(OSError) as refused:
        socket.create_connection(("127.0.0.1", 9), timeout=5)
    assert [is_disk_error(error) for error in (full.value, refused.value, ValueError())] == [True, False, False]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": True})
    program = """
        import os, sys
        from trl_perce.utils.files import write_json_lines
        write_json_lines(sys.argv[1], (os.kill(os.getpid(), 9) if number == 99999 else number for number in range(100000)))
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    assert subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT).returncode == -9
    assert json.loads(path.read_text()) == {"old": True}
    assert (tmp_path / "file.json.part").stat().st_size > 100_000  # it was under way
    write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"new": True} and [*tmp_path.iterdir()] == [path]


def test_any_text_comes_back(tmp_path):
    write_json(tmp_path / "one.json", {"text": HOSTILE})
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8")) == {"text": HOSTILE}
    write_json_lines(tmp_path / "rows.jsonl", ({"text": HOSTILE, "row": row} for row in range(3)))
    assert [*read_lines(tmp_path / "rows.jsonl")] == [{"text": HOSTILE, "row": row} for row in range(3)]
    write_text(tmp_path / "text.md", HOSTILE)
    assert b"\\ud83d" in (tmp_path / "text.md").read_bytes()


def test_a_last_line_that_is_not_whole_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"row": 0}\n{"row": 1}\n{"ro')
    assert [*whole_lines(path)] == [(0, b'{"row": 0}\n'), (11, b'{"row": 1}\n')]
    assert path.read_bytes() == b'{"row": 0}\n{"row": 1}\n'
