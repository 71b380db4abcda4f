# SPDX-License-Identifier: Apache-2.0

"""
Get the public data that the local recipes and `trl-perce prepare` read. Each folder
has train.jsonl, test.jsonl and a README.md with its source and licence.

    python examples/get_data.py                    # all three, to data/
    python examples/get_data.py persona_chat prefeval
    python examples/get_data.py --source_dir ~/Downloads

- persona_chat: Synthetic-Persona-Chat, CC BY 4.0, from the Hub
  (google/Synthetic-Persona-Chat). Its format is `chats`.
- prefeval: PrefEval, CC BY-NC 4.0, by git from
  github.com/amazon-science/PrefEval, since siyanzhao/prefeval_explicit on the
  Hub has no answers. The benchmark `prefeval`, or format `preferences`.
- product_reviews: Amazon Reviews 2023, for research, from the Hub
  (McAuley-Lab/Amazon-Reviews-2023). Format `reviews`.

With --source_dir nothing is downloaded: the files are looked for below that
folder. A sample depends on the files, --seed and the numbers alone. Nobody, and
no topic of PrefEval, is in both files. A folder that has a train.jsonl is left
as it is. For the format `posts` there is no public source.
"""

import argparse
import csv
import gzip
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_perce.benchmarks.prefeval import read_checkout
from trl_perce.benchmarks.reading import random_order, sample, take
from trl_perce.utils.files import write_json_lines, write_text


Splits = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """
    A public data set.

    Parameters:
        about (`str`): What it is, with its paper.
        licence (`str`): Under which it may be used.
        repo (`str`): Where it is: `owner/name` of a dataset on the Hub, or the address of a git repository.
        sizes (`tuple[int, int]`): Records to train and to test, at most.
        make (`Callable`): Makes the splits and counts what is left out.
    """

    about: str
    licence: str
    repo: str
    sizes: tuple[int, int]
    make: Callable[["Source", argparse.Namespace, Counter], Splits]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def get_file(source: Source, path: str, source_dir: Path | None) -> Path:
    """A file of the Hub's repository; with `source_dir` the file of that name below it, which may be gzipped."""
    name = Path(path).name
    if source_dir is not None:
        found = sorted(file for pattern in (name, f"{name}.gz") for file in source_dir.rglob(pattern))
        if not found:
            raise FileNotFoundError(f"There is no {name} below {source_dir}. Its place is {path} of {source.repo}.")
        return found[0]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source.repo, path, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise OSError(
            f"{path} of {source.repo} could not be downloaded from the Hub: {why} Download it by hand, and give its folder as "
            "--source_dir."
        ) from error


def get_clone(source: Source, source_dir: Path | None) -> Path:
    """A checkout of the git repository; with `source_dir` the one below it."""
    if source_dir is not None:
        found = sorted(source_dir.rglob("benchmark_dataset/mcq_options"))
        if not found:
            raise FileNotFoundError(f"There is no checkout of {source.repo} below {source_dir}.")
        return found[0].parent.parent
    folder = Path(".cache") / Path(source.repo).name
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        command = ["git", "clone", "--quiet", "--depth", "1", source.repo, str(part)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            part.rename(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise OSError(f"`{' '.join(command)}` failed: {why} Clone it by hand, and give --source_dir.") from error
    return folder


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV, each with where it is."""
    with _open(path) as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            yield f"{path}, row {number}", row


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of JSON lines, which may be too many for the memory, each with where it is."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: this is not JSON ({error.msg}). Download the file again."
                ) from error
            yield f"{path}, line {number}", record


def _open(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="")


# ── Synthetic-Persona-Chat ───────────────────────────────────────────────────────────────────────────────────────────


def make_persona_chat(source: Source, args: argparse.Namespace, left_out: Counter) -> Splits:
    """The validation file's conversations to train on, since a thousand are enough here, and the test file's to test on."""
    files = {"train": "valid", "test": "test"}
    splits: Splits = {}
    for split, name in files.items():
        path = get_file(source, f"data/Synthetic-Persona-Chat_{name}.csv", args.source_dir)
        made = [_chat(row, where, left_out) for where, row in read_csv(path)]
        splits[split] = [chat for chat in made if chat is not None]
    trained = {_persona(chat) for chat in splits["train"]}
    kept = [chat for chat in splits["test"] if _persona(chat) not in trained]
    left_out["conversations whose person is in the training file"] += len(splits["test"]) - len(kept)
    return {"train": splits["train"], "test": kept}


def _chat(row: dict[str, Any], where: str, left_out: Counter) -> dict[str, Any] | None:
    personas = {
        f"user_{user}_persona": [
            line.strip() for line in take(row, f"user {user} personas", str, where).splitlines() if line.strip()
        ]
        for user in (1, 2)
    }
    lines = [line for line in take(row, "Best Generated Conversation", str, where).splitlines() if line.strip()]
    said = [re.fullmatch(r"User ([12]): (.*)", line.strip()) for line in lines]
    turns = [{"user": int(match[1]), "text": match[2].strip()} for match in said if match]
    if not turns or not all(personas.values()):
        left_out["conversations without a persona, or not in the form of turns"] += 1
        return None
    left_out["lines of conversations that nobody says"] += len(lines) - len(turns)
    return {**personas, "conversation": turns}


def _persona(chat: dict[str, Any]) -> frozenset[str]:
    return frozenset(chat["user_2_persona"])


# ── Amazon Reviews 2023 ──────────────────────────────────────────────────────────────────────────────────────────────


def make_product_reviews(source: Source, args: argparse.Namespace, left_out: Counter) -> Splits:
    """Reviewers with several reviews of some length. Their ids become numbers."""
    reviews = get_file(source, f"raw/review_categories/{args.category}.jsonl", args.source_dir)
    products = get_file(source, f"raw/meta_categories/meta_{args.category}.jsonl", args.source_dir)
    counts: Counter[str] = Counter()
    for where, record in read_jsonl(reviews):
        if _review_text(record, where, args) is not None:
            counts[take(record, "user_id", str, where)] += 1
    wanted = sorted(user for user, count in counts.items() if count >= args.min_reviews)
    number = sum(args.sizes)
    if len(wanted) > 3 * number:  # some will have less than it seems
        wanted = sample(wanted, 3 * number, args.seed)

    found: dict[str, list] = {user: [] for user in wanted}
    for where, record in read_jsonl(reviews):
        text = _review_text(record, where, args) if record["user_id"] in found else None
        if text is not None:
            time, product = take(record, "timestamp", int, where), take(record, "parent_asin", str, where)
            fields = {
                "overall": take(record, "rating", (int, float), where),
                "summary": take(record, "title", str, where),
            }
            found[record["user_id"]].append((time, product, {**fields, "reviewText": text}))
    needed = {product for own in found.values() for _, product, _ in own}
    titles = {}
    for where, record in read_jsonl(products):
        if take(record, "parent_asin", str, where) in needed and record.get("title"):
            titles[record["parent_asin"]] = take(record, "title", str, where)

    reviewers = []
    for own in found.values():
        described = [one for one in own if one[1] in titles]
        left_out["reviews of products without a title"] += len(own) - len(described)
        once = {review["reviewText"]: (time, product, review) for time, product, review in reversed(described)}
        left_out["reviews that the reviewer has put twice"] += len(described) - len(once)
        if len(once) < args.min_reviews:
            left_out[f"reviewers with less than {args.min_reviews} reviews after that"] += 1
            continue
        ordered = sorted(once.values(), key=lambda one: one[:2])
        reviewers.append([{**review, "description": titles[product]} for _, product, review in ordered])
    order = random_order(len(reviewers), args.seed)
    records = [{"reviewer": number, "reviews": reviewers[index]} for number, index in enumerate(order)]
    # Of a small category, a fifth to test
    num_test = min(args.sizes[1], max(1, len(records) // 5))
    return {"test": records[:num_test], "train": records[num_test:]}


def _review_text(record: dict[str, Any], where: str, args: argparse.Namespace) -> str | None:
    """The text of a review that is long enough, without Amazon's marks."""
    text = re.sub(r"<br ?/?>", "\n", take(record, "text", str, where))
    text = re.sub(r"\[\[\w+:[^\]]*\]\]", "", text).strip()
    return text if len(text.split()) >= args.min_words else None


# ── PrefEval ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_prefeval(source: Source, args: argparse.Namespace, left_out: Counter) -> Splits:
    """Questions of people with a preference, with the answer of Mistral 8x7B, which was reminded of it, and four options."""
    folder = get_clone(source, args.source_dir)
    return {split: read_checkout(folder, split, args.seed, left_out) for split in ("train", "test")}


SOURCES = {
    "persona_chat": Source(
        "Synthetic-Persona-Chat (Jandaghi et al. 2023, arXiv 2312.10007): conversations of two people with personas",
        "CC BY 4.0",
        "google/Synthetic-Persona-Chat",
        (1000, 320),
        make_persona_chat,
    ),
    "prefeval": Source(
        "PrefEval (Zhao et al. 2025, arXiv 2502.09597): questions of people with a preference; answers by Mistral 8x7B",
        "CC BY-NC 4.0: not for commercial use",
        "https://github.com/amazon-science/PrefEval",
        (1000, 1000),
        make_prefeval,
    ),
    "product_reviews": Source(
        "Amazon Reviews 2023 (Hou et al. 2024, arXiv 2403.03952): reviewers with their reviews; ids replaced by numbers",
        "no licence is stated; made for research (https://amazon-reviews-2023.github.io)",
        "McAuley-Lab/Amazon-Reviews-2023",
        (200, 50),
        make_product_reviews,
    ),
}


def write(name: str, args: argparse.Namespace) -> None:
    """Make a folder and say what is in it."""
    source, folder, left_out = SOURCES[name], args.output_dir / name, Counter()
    if (folder / "train.jsonl").exists():
        print(f"{folder}: is there already, and left as it is. Remove it to make it anew.")
        return
    args.sizes = (args.num_train or source.sizes[0], args.num_test or source.sizes[1])
    splits = source.make(source, args, left_out)
    for split, number in zip(("train", "test"), args.sizes, strict=True):
        if not splits[split]:
            raise ValueError(f"{name}: nothing is left to {split} on of {source.repo}: {_counted(left_out)}.")
        splits[split] = sample(splits[split], number, args.seed)
    counts = f"{len(splits['train'])} records to train, {len(splits['test'])} to test, seed {args.seed}"
    lines = [
        f"# {name}\n\n{source.about}.\n",
        f"- Source: {source.repo}\n- Licence: {source.licence}\n- Sample: {counts}, by examples/get_data.py of trl_perce",
        f"- Left out: {_counted(left_out)}\n",
    ]
    write_text(folder / "README.md", "\n".join(lines))
    write_json_lines(folder / "test.jsonl", splits["test"])
    write_json_lines(folder / "train.jsonl", splits["train"])  # last: it says that the folder is whole
    print(f"{folder}: {counts}\n  Source: {source.repo}\n  Licence: {source.licence}")
    print("  Left out:", _counted(left_out, ",\n    "))


def _counted(left_out: Counter, separator: str = ", ") -> str:
    return separator.join(f"{count} {what}" for what, count in left_out.items() if count) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="name", help=f"some of {', '.join(SOURCES)} (default all)")
    add("--output_dir", type=Path, default=Path("data"), help="where the folders are made (default data)")
    add(
        "--source_dir",
        type=Path,
        help="folder of files that were downloaded by hand, which is searched; nothing is downloaded",
    )
    add("--num_train", type=int, help="records to train, at most")
    add("--num_test", type=int, help="records to test, at most")
    add("--seed", type=int, default=0, help="of the samples (default 0)")
    add("--category", default="All_Beauty", help="of the products (default All_Beauty, some hundred MB)")
    add("--min_reviews", type=int, default=4, help="that a reviewer has (default 4)")
    add("--min_words", type=int, default=15, help="that a review has (default 15)")
    args = parser.parse_args()
    for name in args.names:
        if name not in SOURCES:
            hint = " There is no public source for it: bring your own." if name in ("forum_posts", "posts") else ""
            parser.error(f"there is no {name!r}; there are {', '.join(SOURCES)}.{hint}")
    if args.source_dir is not None and not args.source_dir.is_dir():
        parser.error(f"--source_dir: there is no folder {args.source_dir}")
    for name in args.names or SOURCES:
        try:
            write(name, args)
        except (ValueError, OSError) as error:
            parser.exit(2, f"get_data.py: error: {error}\n")


if __name__ == "__main__":
    main()
