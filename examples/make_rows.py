# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce prepare` for benchmarks, by its earlier name and with its earlier limits: two rows a user, responses of 300 words at most.

    python examples/make_rows.py rows my_data data/mine                     # your own: {"user", "history", "query", "response"}
    python examples/make_rows.py reviews data/product_reviews data/product_review        # from examples/get_data.py
    python examples/make_rows.py longlamp hub data/product_review --task product_review --retrieval contriever
    python examples/make_rows.py lamp LaMP_5 data/paper_titles --task LaMP_5

The second argument is the folder with the source's files, or `hub` for LongLaMP from the Hub. What the files of `rows`, `reviews`,
`posts`, `chats` and `preferences` look like is said in `trl_perce/benchmarks/histories.py`.
"""

import argparse

from trl_perce.cli.main import main
from trl_perce.prepare.arguments import BENCHMARKS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=BENCHMARKS)
    parser.add_argument("source", help="folder of the source's files, or `hub`")
    parser.add_argument("output", help="folder for train.jsonl and test.jsonl")
    args, rest = parser.parse_known_args()
    limits = ["--rows_per_user", "2", "--max_words", "300"]
    command = ["prepare", args.source, "--format", args.kind, "--output_dir", args.output, *limits, *rest]
    main(command)
