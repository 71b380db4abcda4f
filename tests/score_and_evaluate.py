"""
For test_processes.py, on the processes of `accelerate launch`: evaluate a loaded model that is wrapped as for training, then run the
commands `score` and `evaluate`.

    accelerate launch … tests/score_and_evaluate.py MODEL ROWS FOLDER SCORE.yaml EVALUATE.yaml
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_perce.cli import score
from trl_perce.cli.main import main
from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate


def evaluate_loaded(model, name: str, rows: str, folder: Path) -> dict:
    # One row is left out and seven are scored, each by itself: the second process has more forwards to run than the first
    args = GenerationArguments(
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "temperature": 0.4, "max_length": 200},
        **{"max_new_tokens": 8, "generation_batch_tokens": 300, "score_batch_tokens": 1},
    )
    lines = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()[:8]]
    options = EvaluationArguments(metrics=["rouge"], swap_persona=True)
    return evaluate(model, AutoTokenizer.from_pretrained(name), lines, folder, args, options, {"model": "tiny"})


if __name__ == "__main__":
    name, rows, folder, of_score, of_evaluate = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(name))
    result = evaluate_loaded(model, name, rows, Path(folder))
    (Path(folder) / f"result-{accelerator.process_index}.json").write_text(json.dumps(result))
    score.end_processes = lambda: None  # they go on
    assert main(["score", "--config", of_score]) == 0
    assert main(["evaluate", "--config", of_evaluate]) == 0
