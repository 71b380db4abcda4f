# SPDX-License-Identifier: Apache-2.0

"""
Bring your own data: users' histories, one JSON object a line → rows that `trl-perce train`, `score` and `evaluate` take.

    python examples/own_data.py data/own          # folder with train.jsonl (and test.jsonl) of histories; made if it is not there
"""

import json
import sys
from pathlib import Path

from datasets import Dataset

from trl_perce.benchmarks.histories import load
from trl_perce.history.entries import to_examples
from trl_perce.history.retrieval import Retriever


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/own")
if not folder.exists():
    folder.mkdir(parents=True)
    line = {
        "user": "ann",
        "history": ["I sew my own dresses.", "My needles come from Osaka.", "I ride a bicycle to work."],
        "query": "What should I buy in Japan?",
        "response": "Needles, and some indigo linen for a dress.",
    }
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")

rows = load("train", folder)  # checked; what cannot be used is counted in the log
retrieved = Retriever("bm25", k=2)(rows)  # the entries that go best with each query
dataset = Dataset.from_list(to_examples(rows, retrieved))
dataset.to_json(folder / "rows" / "train.jsonl", force_ascii=False)
print(json.dumps(dataset[0], indent=2))
print(
    f"{len(dataset)} rows in {folder / 'rows'}: trl-perce score --model_name_or_path … --dataset_name {folder / 'rows'}"
)
