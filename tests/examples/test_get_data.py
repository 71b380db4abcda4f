"""Public data from files of the original shape, as somebody has them who downloaded them by hand. The Hub is never asked."""

import csv
import gzip
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from get_data import SOURCES, main
from rows import write_lines
from trl_perce.benchmarks.histories import load
from trl_perce.benchmarks.prefeval import TEST_TOPICS, _whole
from trl_perce.reproduce.settings import load_settings


FORMATS = {"persona_chat": "chats", "product_reviews": "reviews", "prefeval": "preferences"}


def write_chats(folder: Path) -> None:
    """The columns and the form of google/Synthetic-Persona-Chat."""
    for name, count in (("valid", 12), ("test", 8)):
        with open(folder / f"Synthetic-Persona-Chat_{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user 1 personas", "user 2 personas", "Best Generated Conversation"])
            for index in range(count):
                said = f'User 1: Hi, I\'m number {index}.\n\nUser 2: Hello, "you".\n[Later]\nUser 1: Bye.\nUser 2: See you.'
                writer.writerow(["I sew.\nI run.", f"I am {name} {index}.\nI row, {name} {index}.\n", said])
            writer.writerow(["I sew.", "I bake.", "*User 1:* Hi!\n*User 2:* Hello!"])
            writer.writerow(["I sew.", "I row, valid 3.\nI am valid 3.", "User 1: Hi!\nUser 2: The same person."])


def write_reviews(folder: Path) -> None:
    """Lines of McAuley-Lab/Amazon-Reviews-2023, gzipped as on its own site; 20 reviewers with five good reviews each."""
    reviews = [
        {
            **{
                "rating": 4.0,
                "title": f"Summary {time}",
                "text": f"Words of {user}, {time}.<br />" + "so very good " * 5,
            },
            **{
                "images": [],
                "asin": "B0",
                "parent_asin": f"P{time % 3}",
                "user_id": f"AE{user}",
                "timestamp": 1000 - time,
            },
            **{"helpful_vote": 0, "verified_purchase": True},
        }
        for user in range(20)
        for time in range(5)
    ]
    few = [line | {"user_id": "AEfew"} for line in reviews[:3]]
    twice = [line | {"user_id": "AEtwice"} for line in [*reviews[:3], *reviews[:3]]]
    untitled = [line | {"user_id": "AE0", "text": line["text"] + "!", "parent_asin": "P9"} for line in reviews[:1]]
    short = [line | {"user_id": "AEshort", "text": "Nice. [[VIDEOID:a1b2]]"} for line in reviews[:5]]
    products = [{"parent_asin": f"P{index}", "title": f"Product {index}", "price": None} for index in range(3)]
    (folder / "raw" / "deep").mkdir(parents=True)
    write_lines(folder / "raw" / "deep" / "meta_All_Beauty.jsonl", [*products, {"parent_asin": "P9", "title": ""}])
    with gzip.open(folder / "All_Beauty.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*reviews, *few, *twice, *untitled, *short])


def write_preferences(folder: Path) -> None:
    """What is read of a checkout of PrefEval."""
    for topic in (*TEST_TOPICS, "pet_ownership", "shop_home"):
        asked = [{"preference": f"I like {topic} {index}.", "question": "What now?"} for index in range(4)]
        options = [one | {"classification_task_options": ["Right.", "Wrong.", "Bad.", "Worse."]} for one in asked]
        answers = [one | {"response_to_pref": "Fine.", "response_to_q": " Do it. But do not"} for one in asked]
        for path, content in (
            (f"benchmark_dataset/mcq_options/{topic}.json", options[:-1] if topic == "shop_home" else options),
            (f"SFT/single_pref_remind/{topic}/mistral8x7b_{topic}_2turn.json", answers),
        ):
            file = folder / "PrefEval" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_chats(folder)
    write_reviews(folder)
    write_preferences(folder)
    return folder


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["get_data.py", *map(str, arguments)])
    main()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(source, tmp_path, monkeypatch):
    run(monkeypatch, "--source_dir", source, "--output_dir", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("name", SOURCES)
def test_what_it_writes_is_what_histories_read(data, name):
    rows = {
        split: load(split, data / name, FORMATS[name], validation_size=0.2)
        for split in ("train", "validation", "test")
    }
    people = [{str(entry.text) for row in own for entry in row.history} for own in rows.values()]
    assert all(people) and not people[0] & people[1] and not people[0] & people[2]
    note = (data / name / "README.md").read_text()
    assert f"Licence: {SOURCES[name].licence}" in note and SOURCES[name].repo in note and "seed 0" in note


def test_conversations(data):
    train, test = (read(data / "persona_chat" / f"{split}.jsonl") for split in ("train", "test"))
    assert train[0] == {
        "user_1_persona": ["I sew.", "I run."],
        "user_2_persona": ["I am valid 0.", "I row, valid 0."],
        "conversation": [
            {"user": 1, "text": "Hi, I'm number 0."},
            {"user": 2, "text": 'Hello, "you".'},
            {"user": 1, "text": "Bye."},
            {"user": 2, "text": "See you."},
        ],
    }
    assert len(train) == 13 and len(test) == 8  # who is in both, with the sentences in another order, is not tested on
    note = (data / "persona_chat" / "README.md").read_text()
    for counted in (
        "20 lines of conversations that nobody says",
        "2 conversations without a persona",
        "1 conversations whose person",
    ):
        assert counted in note


def test_reviewers(data):
    train, test = (read(data / "product_reviews" / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 16 and len(test) == 4
    assert sorted(line["reviewer"] for line in train + test) == list(range(20))
    for line in train + test:
        assert [review["summary"] for review in line["reviews"]] == [f"Summary {time}" for time in (4, 3, 2, 1, 0)]
        assert line["reviews"][0]["description"] == "Product 1" and line["reviews"][0]["overall"] == 4.0
        assert ".\nso very good" in line["reviews"][0]["reviewText"] and "AE" not in json.dumps(line)
    note = (data / "product_reviews" / "README.md").read_text()
    for counted in (
        "1 reviews of products without a title",
        "3 reviews that the reviewer has put twice",
        "1 reviewers with less than 4",
    ):
        assert counted in note


def test_preferences(data):
    train, test = (read(data / "prefeval" / f"{split}.jsonl") for split in ("train", "test"))
    assert {line["topic"] for line in train} == {"pet_ownership", "shop_home"} and len(train) == 7
    assert {line["topic"] for line in test} == {*TEST_TOPICS} and len(test) == 20
    assert "1 questions without options or an answer" in (data / "prefeval" / "README.md").read_text()
    for line in train + test:
        assert (
            line["options"][line["answer"]] == "Right."
            and len({*line["options"]}) == 4
            and line["response"] == "Do it."
        )
    assert len({line["answer"] for line in train + test}) > 1


def test_a_sample_depends_on_the_seed_alone(source, tmp_path, monkeypatch, capsys):
    common = ("persona_chat", "--source_dir", source, "--num_train", 5, "--num_test", 2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(monkeypatch, *common, "--output_dir", tmp_path / name, "--seed", seed)
    assert capsys.readouterr().out.count("  Licence: CC BY 4.0\n") == 3
    a, b, c = ((tmp_path / name / "persona_chat" / "train.jsonl").read_text() for name in "abc")
    assert a == b != c and len(a.splitlines()) == 5


def test_what_is_there_is_left_as_it_is(data, source, monkeypatch, capsys):
    (data / "prefeval" / "train.jsonl").write_text("mine")
    run(monkeypatch, "prefeval", "--source_dir", source, "--output_dir", data)
    assert (data / "prefeval" / "train.jsonl").read_text() == "mine"
    assert "is there already, and left as it is" in capsys.readouterr().out


def test_a_repository_is_cloned_once(source, tmp_path, monkeypatch, capsys):
    git = ("git", "-C", str(source / "PrefEval"), "-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "x")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SOURCES, "prefeval", replace(SOURCES["prefeval"], repo=str(source / "PrefEval")))
    run(monkeypatch, "prefeval")
    assert len(read(Path("data/prefeval/test.jsonl"))) == 20 and Path(".cache/PrefEval/.git").is_dir()
    shutil.rmtree(source)
    shutil.rmtree("data")
    run(monkeypatch, "prefeval")
    shutil.rmtree("data")
    shutil.rmtree(".cache")
    with pytest.raises(SystemExit):
        run(monkeypatch, "prefeval")
    error = capsys.readouterr().err
    assert "git clone --quiet --depth 1" in error and "does not exist" in error and "Clone it by hand" in error


def test_errors(source, tmp_path, monkeypatch, capsys):
    def fails(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *arguments, "--output_dir", tmp_path / "out")
        assert stopped.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "There is no public source for it: bring your own." in fails("forum_posts")
    assert "there is no folder" in fails("prefeval", "--source_dir", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no Synthetic-Persona-Chat_valid.csv below" in fails("persona_chat", "--source_dir", tmp_path / "empty")
    assert "There is no checkout of https://github.com/amazon" in fails("prefeval", "--source_dir", tmp_path / "empty")
    offline = fails("persona_chat")  # `HF_HUB_OFFLINE` is set
    assert "could not be downloaded from the Hub" in offline and "give its folder as --source_dir" in offline
    nothing = fails("product_reviews", "--source_dir", source, "--min_reviews", 9)
    assert "nothing is left to train on" in nothing
    (source / "Synthetic-Persona-Chat_valid.csv").write_text("user 1 personas,persona\na,b\n")
    assert "valid.csv, row 1: there is no 'user 2 personas'; there are 'user 1" in fails(
        "persona_chat", "--source_dir", source
    )
    write_lines(source / "raw" / "deep" / "meta_All_Beauty.jsonl", [{"asin": "P0"}])
    assert "meta_All_Beauty.jsonl, line 1: there is no 'parent_asin'" in fails(
        "product_reviews", "--source_dir", source
    )


def test_an_answer_ends_with_a_sentence():
    assert _whole(" Buy it. Really!\n") == "Buy it. Really!"
    assert _whole("Buy it. 2. Call Amazon.com and ask") == "Buy it. 2."
    assert _whole("no sentence") == "no sentence"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "reproduce").glob("local*.yaml")), ids=lambda path: path.stem
)
def test_the_local_recipes_name_what_can_be_had(path):
    settings = load_settings(path)
    for task in settings.tasks.values():
        if task.of is not None:
            continue
        folder = Path(task.options["path"])
        assert folder.parent == Path("data") and (folder.name in SOURCES or path.stem == "local_posts")
        expected = "prefeval" if task.benchmark == "prefeval" else task.options["format"]
        assert expected in (folder.name, FORMATS.get(folder.name, "posts"))
