"""
Evaluate on the processes of `accelerate launch`, for test_processes.py: a loaded model that is wrapped as for training, by `evaluate`, then by
the command.

    accelerate launch … tests/evaluate_on_processes.py MODEL ROWS FOLDER ARGUMENTS OF THE COMMAND
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_perce.cli.main import main
from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate


def evaluate_loaded(model, name: str, rows: str, folder: Path) -> dict:
    args = GenerationArguments(
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "temperature": 0.4, "max_length": 600},
        **{"max_new_tokens": 8, "generation_batch_tokens": 300, "score_batch_tokens": 300},
    )
    lines = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    options = EvaluationArguments(metrics=["rouge"], swap_persona=True)
    return evaluate(model, AutoTokenizer.from_pretrained(name), lines, folder, args, options, {"model": "tiny"})


if __name__ == "__main__":
    name, rows, folder, *argv = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(name))
    result = evaluate_loaded(model, name, rows, Path(folder))
    (Path(folder) / f"result-{accelerator.process_index}.json").write_text(json.dumps(result))
    raise SystemExit(main(argv))
