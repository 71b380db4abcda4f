"""What `trl-perce train` leaves behind: cards, and the next command."""

import json

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard

from processes import recipe
from rows import make_chat_rows, write_lines
from trl_perce.cli.main import main


@pytest.mark.parametrize("is_mixture", [False, True])
def test_the_cards_of_checkpoints_name_the_dataset(tmp_path, tiny_model, monkeypatch, is_mixture):
    values = {"model_name_or_path": tiny_model, "dataset_name": "somebody/rows", "max_steps": 1, "save_steps": 1}
    values |= {"save_strategy": "steps", "output_dir": str(tmp_path / "out")}
    if is_mixture:  # goes before `dataset_name`
        data = write_lines(tmp_path / "rows.jsonl", make_chat_rows())
        values["datasets"] = [{"path": "json", "data_files": data, "split": "train"}]
    else:  # instead of the Hub
        dataset = DatasetDict(train=Dataset.from_list(make_chat_rows()))
        monkeypatch.setattr("trl_perce.cli.train.load_data", lambda *args: dataset)
    assert main(["train", "--config", recipe(tmp_path / "config.yaml", **values)]) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        assert "trl-perce" in card.data.tags
        assert card.data.datasets == (None if is_mixture else ["somebody/rows"])
