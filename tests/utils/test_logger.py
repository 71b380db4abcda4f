"""Whose line of the log it is."""

import pytest
from accelerate import PartialState

from trl_perce.utils.logger import get_logger


@pytest.mark.parametrize(
    "processes, index, shown", [(1, 0, ["a", "b"]), (2, 0, ["[RANK 0] a", "[RANK 0] b"]), (2, 1, ["[RANK 1] b"])]
)
def test_a_line_names_its_process_where_there_are_several(monkeypatch, caplog, processes, index, shown):
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", processes)
    monkeypatch.setitem(PartialState._shared_state, "process_index", index)
    logger = get_logger("trl_perce.x")
    logger.warning("a")
    logger.warning("b", main_process_only=False)
    assert [record.getMessage() for record in caplog.records] == shown
    assert {record.filename for record in caplog.records} == {"test_logger.py"}
