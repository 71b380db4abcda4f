# SPDX-License-Identifier: Apache-2.0

"""
Have persona questions written by any model behind an OpenAI-compatible endpoint, in the format of
`trl_perce/benchmarks/data/persona_qa`, which `trl-perce train` and `examples/identification.py` take.

    pip install 'trl_perce[judge]'
    python examples/build_persona_qa.py --personas google/Synthetic-Persona-Chat --num_personas 40 \
        --base_url http://localhost:8000/v1 --model Qwen/Qwen3-14B --output data/persona_qa.jsonl

The key comes from OPENAI_API_KEY. A run that was killed goes on where it was: answers are kept beside the output.
"""

import argparse
import random
from pathlib import Path

from trl_perce.benchmarks.persona_qa_builder import TOPICS, build_rows, read_personas, write_rows
from trl_perce.evaluation.endpoint import Endpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--personas",
        required=True,
        help=".txt (a persona a line), .jsonl (columns named *persona*) or a dataset of the Hub",
    )
    parser.add_argument("--num_personas", type=int, help="draw so many of them (default: all)")
    parser.add_argument("--questions", type=int, default=3, help=f"rows a persona, at most {len(TOPICS)} (default 3)")
    parser.add_argument("--base_url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="name of the model as the server knows it")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--max_tokens", type=int, default=512, help="tokens of a reply; a model that thinks needs more"
    )
    parser.add_argument("--concurrency", type=int, default=4, help="requests at the same time (default 4)")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file for the rows")
    parser.add_argument("--seed", type=int, default=0, help="for the draw of personas and topics")
    args = parser.parse_args()
    if not 1 <= args.questions <= len(TOPICS):
        parser.error(f"--questions {args.questions}: write a number from 1 to {len(TOPICS)}")

    personas = read_personas(args.personas)
    if args.num_personas is not None:
        if not 1 <= args.num_personas <= len(personas):
            parser.error(f"--num_personas {args.num_personas}: {args.personas} has {len(personas)} personas")
        personas = random.Random(args.seed).sample(personas, args.num_personas)
    endpoint = Endpoint(
        args.base_url,
        args.model,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        cache_path=args.output.with_suffix(".answers.jsonl"),
    )
    built = build_rows(personas, endpoint, args.questions, args.seed)
    rejected = args.output.with_suffix(".rejected.jsonl")
    write_rows(args.output, built.rows)
    write_rows(rejected, built.rejected)
    print(f"{args.output}: {len(built.rows)} rows about {len({row['persona'] for row in built.rows})} people")
    print(f"{rejected}: {len(built.rejected)} replies")
    for reason, number in built.reasons.most_common():
        print(f"  {number:5d}  {reason}")


if __name__ == "__main__":
    main()
