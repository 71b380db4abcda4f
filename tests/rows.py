"""Rows in the formats that users write, and their files."""

import json
from collections.abc import Iterable
from pathlib import Path


def make_chat_rows(count: int = 12, question: str = "What should I buy, number {}?") -> list[dict]:
    """Conversations of one round. No word of the personas and answers' own is in the prompts."""
    return [
        {
            "persona": f"I am Zarquon the {index}th.",
            "prompt": [{"role": "user", "content": "About me: {persona}\n" + question.format(index)}],
            "completion": [{"role": "assistant", "content": f"Quibbles, number {index}."}],
        }
        for index in range(count)
    ]


def write_lines(path: Path, lines: Iterable) -> str:
    """JSON lines; the file's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_splits(folder: Path, **splits: Iterable) -> str:
    """A folder with a file for each split, as `--dataset_name` takes it; its path."""
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)
    return str(folder)
