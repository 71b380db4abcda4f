"""What `trl-perce train` leaves behind: cards, and the next command."""

import json
import subprocess

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard

from processes import recipe
from rows import make_chat_rows, write_lines, write_splits
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


@pytest.mark.parametrize("has_test", [True, False])
def test_the_command_that_is_printed_evaluates(tmp_path, tiny_model, capsys, monkeypatch, has_test):
    monkeypatch.chdir(tmp_path)
    splits = {"train": make_chat_rows()} | ({"test": make_chat_rows(2)} if has_test else {})
    if has_test:  # as conversations, which are evaluated as they are trained
        splits = {
            name: [{"persona": row["persona"], "messages": row["prompt"] + row["completion"]} for row in rows]
            for name, rows in splits.items()
        }
    write_splits(tmp_path / "my data", **splits)
    recipe(tmp_path / "config.yaml", model_name_or_path=tiny_model, max_steps=1, max_length=200)
    argv = ["--config", "config.yaml", "--dataset_name", "my data", "--output_dir", "outputs/my adapter/"]
    assert main(["train", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("trl-perce evaluate \\")
    assert all(len(line) <= 80 for line in lines)
    assert "The adapter is in outputs/my adapter/." in lines[start - 4]
    assert ("split 'test'" if has_test else "training rows") in lines[start - 2]
    shell = "trl-perce() { printf '%s\\0' \"$@\"; }\n" + "\n".join(lines[start:])
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert main([*words, "--metrics", "rouge"]) == 0  # METEOR wants NLTK's data
    found = json.loads((tmp_path / "outputs" / "my adapter-evaluation" / "metrics.json").read_text())
    settings = found["settings"]
    assert (settings["adapter"], settings["rows"]) == ("outputs/my adapter", 2 if has_test else 12)
    assert (settings["max_length"], settings["max_new_tokens"], found["predicted"]) == (200, 100, settings["rows"])
