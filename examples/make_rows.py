# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Turn files of user histories into rows with `persona`, `prompt` and `completion`, which `trl-perce train` takes.

    python examples/make_rows.py reviews SOURCE_FOLDER data/product_review
    python examples/make_rows.py posts SOURCE_FOLDER data/forum_posts
    python examples/make_rows.py chats SOURCE_FOLDER data/persona_chat

`SOURCE_FOLDER` holds `train.jsonl` and `test.jsonl`. A line of `reviews` is a reviewer, `{"reviews": [{"overall",
"summary", "description", "reviewText"}, …]}`: one review is left out and becomes the response, the others are the persona.
A line of `posts` is an author, `{"posts": [{"forum", "post"}, …]}`: likewise, and the question gives the post's first ten
words. A line of `chats` is a conversation, `{"user_2_persona": [sentence, …], "conversation": [{"user": 1 or 2, "text"},
…]}`: the second user's replies become responses, given that user's persona and the dialogue so far.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from trl_perce.files import written_whole


def leave_one_out(items: list[dict], entries: int, rows: int, rng: random.Random) -> Iterator[tuple[dict, list[dict]]]:
    """Leave one item out, `rows` times at most: that item, and up to `entries` of the others in their order."""
    for target in rng.sample(range(len(items)), min(rows, len(items))):
        others = [item for index, item in enumerate(items) if index != target]
        yield (
            items[target],
            [others[index] for index in sorted(rng.sample(range(len(others)), min(entries, len(others))))],
        )


def review_rows(reviewer: dict, entries: int, rows: int, rng: random.Random) -> Iterator[dict]:
    """One of the reviewer's reviews is the response, others are the persona."""
    for review, others in leave_one_out(reviewer["reviews"], entries, rows, rng):
        question = (
            f'Write the review that this reviewer writes of a product with the description "{review["description"]}". They '
            f'give it {review["overall"]:g} of 5 stars. The summary of the review is "{review["summary"]}".'
        )
        yield {
            "persona": "\n\n".join(
                f'{other["overall"]:g} of 5 stars for "{other["description"]}": {other["summary"]}\n{other["reviewText"]}'
                for other in others
            ),
            "prompt": [{"role": "user", "content": f"Past reviews of a reviewer:\n\n{{persona}}\n\n{question}"}],
            "completion": [{"role": "assistant", "content": review["reviewText"]}],
        }


def post_rows(author: dict, entries: int, rows: int, rng: random.Random) -> Iterator[dict]:
    """One of the author's posts, but for its first words, is the response, others are the persona."""
    for post, others in leave_one_out(author["posts"], entries, rows, rng):
        words = post["post"].split()
        question = (
            f'Go on with the post that this author begins in the forum {post["forum"]} with "{" ".join(words[:10])}".'
        )
        yield {
            "persona": "\n\n".join(f"In {other['forum']}: {other['post']}" for other in others),
            "prompt": [{"role": "user", "content": f"Past posts of an author:\n\n{{persona}}\n\n{question}"}],
            "completion": [{"role": "assistant", "content": " ".join(words[10:])}],
        }


def chat_rows(chat: dict, entries: int, rows: int, rng: random.Random) -> Iterator[dict]:
    """Up to `rows` replies of the second user; the persona is up to `entries` of that user's sentences."""
    turns = chat["conversation"]
    replies = [i for i, turn in enumerate(turns) if turn["user"] == 2 and i > 0 and turns[i - 1]["user"] == 1]
    for target in sorted(rng.sample(replies, min(rows, len(replies)))):
        before = turns[:target] if turns[0]["user"] == 1 else turns[1:target]
        prompt = [{"role": "user" if turn["user"] == 1 else "assistant", "content": turn["text"]} for turn in before]
        prompt[0]["content"] = f"You are this person: {{persona}}\nChat with me.\n\n{prompt[0]['content']}"
        yield {
            "persona": " ".join(chat["user_2_persona"][:entries]),
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": turns[target]["text"]}],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["reviews", "posts", "chats"])
    parser.add_argument("source", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("output", type=Path, help="folder for the rows")
    parser.add_argument("--entries", type=int, default=4, help="history entries or sentences a persona (default 4)")
    parser.add_argument("--rows", type=int, default=2, help="rows a reviewer or conversation (default 2)")
    parser.add_argument("--max_words", type=int, default=300, help="leave out longer responses (default 300 words)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    to_rows = {"reviews": review_rows, "posts": post_rows, "chats": chat_rows}[args.kind]
    for split in ("train", "test"):
        rng, kept, left_out = random.Random(args.seed), 0, 0
        with (
            open(args.source / f"{split}.jsonl", encoding="utf-8") as source,
            written_whole(args.output / f"{split}.jsonl") as part,
            open(part, "w", encoding="utf-8") as out,
        ):
            for line in source:
                for row in to_rows(json.loads(line), args.entries, args.rows, rng):
                    words = len(row["completion"][0]["content"].split())
                    if not row["persona"].strip() or not 1 <= words <= args.max_words:
                        left_out += 1
                        continue
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept += 1
        print(
            f"{args.output / split}.jsonl: {kept} rows; left out {left_out} (no persona, or a response that is empty or "
            f"longer than {args.max_words} words)"
        )


if __name__ == "__main__":
    main()
