import json

import pytest

from trl_perce.persona.rows import find_bad_line, find_bad_row


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"a": "x"}, {"a": None}, {"b": 1}, {"a": "y", "b": 2.5}], None),
        ([{"a": "x"}, "y"], "Row 1: it is a str"),
        ([{"a": "x"}, {"a": True}], "Row 1: column 'a' is a truth value, while it is a text in row 0"),
        ([{"a": None}, {"a": []}, {"a": {}}], "Row 2: column 'a' is a object, while it is a list in row 1"),
        ([{"a": [{"content": "x\udfff"}]}], "Row 0: column 'a' holds half of a surrogate pair"),
        ([{"a": "🧵"}], None),
    ],
)
def test_the_first_bad_row(rows, message, tmp_path):
    found = find_bad_row(rows)
    assert found is None if message is None else found.startswith(message)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    of_lines, of_list = find_bad_line(tmp_path / "rows.jsonl"), find_bad_line(tmp_path / "rows.json")
    assert of_list == found and (found is None) == (of_lines is None)
    if found:
        number = int(found.split()[1].strip(":"))
        assert of_lines.startswith(f"Line {number + 1}: ") and of_lines.split(": ", 1)[1] == found.split(": ", 1)[1]


def test_a_file_that_ends_too_early(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert find_bad_line(tmp_path / "rows.jsonl").startswith("Line 3 is no JSON")
    (tmp_path / "rows.json").write_text('[\n{"a": 1},\n{"a"')
    assert find_bad_line(tmp_path / "rows.json").startswith("Line 3 is no JSON")
