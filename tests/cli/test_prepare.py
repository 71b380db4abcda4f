import csv
import io
import json
import re
from email.message import EmailMessage
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rows import write_lines
from trl_perce import PerContrast, PerContrastConfig
from trl_perce.cli.main import main
from trl_perce.persona.marks import mark_persona
from trl_perce.prepare.arguments import PrepareArguments
from trl_perce.prepare.prepare import Preparation
from trl_perce.prepare.preview import print_legend, print_row
from trl_perce.prepare.secrets import find_secrets, passes_luhn


TALK = [
    ("user", "Where to?"),
    ("assistant", "Osaka, naïve or not."),
    ("user", "Why?"),
    ("assistant", "For the needles."),
]
NOTES = {"ann": "I sew.", "bob": "I sail."}


def prepare(tmp_path, *argv) -> dict[str, list[dict]]:
    """Run the command; the rows of each split that it wrote."""
    out = tmp_path / "out"
    main(["prepare", *map(str, argv), "--output_dir", str(out)])
    return {path.stem: [*map(json.loads, path.read_text().splitlines())] for path in out.glob("*.jsonl")}


def rows_of(tmp_path, *argv) -> list[dict]:
    """The same without splits."""
    (rows,) = prepare(tmp_path, *argv, "--validation_size", 0, "--test_size", 0).values()
    return rows


def summary(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "prepare.json").read_text())


def openai(user: str, talk=TALK, **more) -> dict:
    return {"user_id": user, "messages": [{"role": role, "content": text} for role, text in talk], **more}


def personas(row) -> list[str]:
    marked, spans = mark_persona(json.loads(json.dumps(row)))
    return [marked["prompt"][span.message]["content"][span.start : span.end] for span in spans]


# ── chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chat_logs_with_notes_become_rows(tmp_path, capsys):
    lines = [openai(f"u{index}", notes=f"I am number {index}.") for index in range(10)]
    lines += [openai("u0", notes=None), openai("u1", [("user", "Hi")], notes="x"), openai(None, notes="x")]
    splits = prepare(tmp_path, write_lines(tmp_path / "logs.jsonl", lines), "--persona_column", "notes")
    assert {split: len({row["user"] for row in rows}) for split, rows in splits.items()} == {
        **{"train": 8, "validation": 1, "test": 1}
    }
    (first, second), user = splits["test"], splits["test"][0]["user"]
    assert first == {
        "id": f"{user[1:]}/1",
        "user": user,
        "persona": f"I am number {user[1:]}.",
        "prompt": [{"role": "user", "content": "About the user:\n{persona}\n\nWhere to?"}],
        "completion": [{"role": "assistant", "content": "Osaka, naïve or not."}],
    }
    assert [message["content"] for message in second["prompt"][1:]] == ["Osaka, naïve or not.", "Why?"]
    assert personas(second) == [first["persona"]]
    kept = summary(tmp_path)
    assert kept["splits"] == {
        split: {"rows": 2 * n, "users": n} for split, n in (("train", 8), ("validation", 1), ("test", 1))
    }
    assert kept["left_out"] == {
        "the persona is empty": 2,
        "a conversation without a reply": 1,
        "the user is empty": 1,
    }
    assert kept["settings"]["persona_column"] == "notes" and kept["records"] == 13
    out = capsys.readouterr().out
    assert "train             16 rows of 8 users" in out and "2  the persona is empty" in out
    assert max(map(len, out.splitlines()[1:-1])) <= 80


def test_the_commands_take_what_is_written(tmp_path, tokenizer):
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_perce import PerContrastConfig
    from trl_perce.cli.common import load_data
    from trl_perce.scoring.preparation import Preparation as Tokenized

    lines = [openai(f"u{index}", notes=f"I am number {index}.") for index in range(10)]
    splits = prepare(tmp_path, write_lines(tmp_path / "logs.jsonl", lines), "--persona_column", "notes")
    data = load_data(ScriptArguments(dataset_name=str(tmp_path / "out")), DatasetMixtureConfig())
    assert {name: len(rows) for name, rows in data.items()} == {name: len(rows) for name, rows in splits.items()}
    prepared = Tokenized(tokenizer, PerContrastConfig(use_cpu=True))(data["test"], "test", needs_persona=True)
    assert not prepared.skipped
    assert all(1 in row["persona_mask"] for rows, _ in prepared.blocks() for row in rows)


def write_forms(folder: Path) -> dict[str, list[str]]:
    """The same two conversations in each form → arguments of the command."""
    write_lines(folder / "openai.jsonl", [openai(user, notes=notes) for user, notes in NOTES.items()])
    names = {"user": "human", "assistant": "gpt"}
    share = [
        {"user": user, "about": [notes], "conversations": [{"from": names[r], "value": text} for r, text in TALK]}
        for user, notes in NOTES.items()
    ]
    (folder / "share.json").write_text(json.dumps({"data": share}))
    with open(folder / "flat.csv", "w", encoding="cp1252", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["session_id", "user", "role", "text", "created_at", "notes"])
        for minute, (role, text) in reversed([*enumerate(TALK)]):  # not in the order of the times
            writer.writerows([["s", user, role, text, f"2024-05-01T10:0{minute}:00", n] for user, n in NOTES.items()])
    turns = [
        {"author": user, "q": "Where to?", "a": TALK[1][1], "name": user, "fact": notes}
        for user, notes in NOTES.items()
    ]
    pandas.DataFrame(turns).to_parquet(folder / "pairs.parquet")
    return {
        "openai.jsonl": ["--persona_column", "notes"],
        "share.json": ["--persona_column", "about"],
        "flat.csv": ["--persona_column", "notes"],
        "pairs.parquet": [
            *("--format", "pairs", "--prompt_column", "q", "--response_column", "a"),
            *("--persona_template", "{fact}"),
        ],
    }


def test_each_form_of_a_log_gives_the_same_rows(tmp_path, capsys):
    found = {}
    for name, argv in write_forms(tmp_path).items():
        rows = rows_of(tmp_path, tmp_path / name, *argv)
        found[name] = sorted(
            (row["user"], row["persona"], str(row["prompt"]), row["completion"][0]["content"]) for row in rows
        )
    assert len(found["openai.jsonl"]) == 4
    assert found["openai.jsonl"] == found["share.json"] == found["flat.csv"]
    assert found["pairs.parquet"] == [row for row in found["openai.jsonl"] if "Osaka" in row[3]]
    assert "flat.csv is read as cp1252" in capsys.readouterr().out


def test_only_the_last_reply_and_few_turns(tmp_path):
    talk = [("system", "Be short."), *TALK, ("user", "Bye."), ("user", "Bye!"), ("assistant", "See you.")]
    source = write_lines(tmp_path / "logs.jsonl", [openai("ann", talk, notes="I sew.")])
    (row,) = rows_of(tmp_path, source, "--persona_column", "notes", "--replies", "last", "--turns", 2)
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [
        ("system", "Be short."),
        ("user", "About the user:\n{persona}\n\nBye.\n\nBye!"),
    ]
    assert summary(tmp_path)["left_out"] == {"not the last reply of its conversation (`replies`)": 2}


def test_the_history_of_a_chat_is_what_its_user_wrote_in_earlier_ones(tmp_path):
    talks = [[("user", f"My cat is number {index}."), ("assistant", f"Well, {index}.")] for index in range(3)]
    days = [3, 1, 2]  # the time, and not the place in the file, is the order
    lines = [openai("ann", talk, created_at=f"2024-05-0{day}") for talk, day in zip(talks, days, strict=True)]
    source = write_lines(tmp_path / "logs.jsonl", lines)
    rows = {
        row["completion"][0]["content"]: row["persona"] for row in rows_of(tmp_path, source, "--retrieval", "recency")
    }
    assert rows == {"Well, 0.": "My cat is number 2.\n\nMy cat is number 1.", "Well, 2.": "My cat is number 1."}
    assert summary(tmp_path)["left_out"] == {"the user wrote nothing else, or nothing earlier": 1}
    for line in lines:
        del line["created_at"]
    write_lines(tmp_path / "logs.jsonl", lines)
    assert [row["completion"][0]["content"] for row in rows_of(tmp_path, source)] == ["Well, 1.", "Well, 2."]


def test_people_who_talk_with_each_other_are_in_one_split(tmp_path, capsys):
    lines = [
        {"conversation_id": pair, "speaker": f"{name}{pair}", "text": f"{name} says {turn} to {pair}.", "notes": name}
        for pair in range(6)
        for turn in range(2)
        for name in ("ann", "bob")
    ]
    splits = prepare(tmp_path, write_lines(tmp_path / "chat.jsonl", lines), "--persona_column", "notes")
    pairs = {split: {row["user"][3:] for row in rows} for split, rows in splits.items()}
    assert {split: len(own) for split, own in pairs.items()} == {"train": 4, "validation": 1, "test": 1}
    row = next(row for row in splits["train"] if row["user"].startswith("bob"))
    assert row["persona"] == "bob" and row["completion"][0]["content"].startswith("bob says 0")
    assert "6 groups, the largest of 2 users" in " ".join(capsys.readouterr().out.split())


def test_a_flat_log_without_conversations_parts_at_silence(tmp_path):
    times = {
        "2024-05-01T10:00": "user",
        "2024-05-01T10:30": "assistant",
        "2024-05-01T12:00": "user",
        "2024-05-01T12:01": "assistant",
    }
    lines = [
        {"user": user, "role": role, "text": f"{role} at {time[11:]}", "time": time, "notes": user}
        for user in NOTES
        for time, role in times.items()
    ]
    argv = (write_lines(tmp_path / "flat.jsonl", lines), "--persona_column", "notes")
    for hours, lengths in (("1", [1, 1]), ("8", [1, 3])):
        rows = rows_of(tmp_path, *argv, "--gap_hours", hours)
        assert [len(row["prompt"]) for row in rows] == 2 * lengths


def test_three_speakers_are_told_apart(tmp_path):
    lines = [{"chat_id": 1, "speaker": name, "text": "Hello.", "notes": name} for name in ("ann", "bob", "cy")]
    rows = rows_of(tmp_path, write_lines(tmp_path / "flat.jsonl", lines), "--persona_column", "notes")
    assert [(row["user"], row["prompt"][0]["content"].split("\n\n", 1)[1]) for row in rows] == [
        ("bob", "ann: Hello."),
        ("cy", "ann: Hello.\n\nbob: Hello."),
    ]


def test_what_has_no_text_or_holds_marks_is_left_out_and_counted(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]}
    image = {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "I see."}]}
    ask = {"role": "user", "content": "What?"}
    marked = {"role": "user", "content": "Where is <persona>?"}
    talks = [[ask, call, {"role": "tool", "content": "x"}, answer], [image, answer], [ask, answer], [marked, answer]]
    lines = [{"user": "ann", "messages": talk, "notes": "I sew."} for talk in talks]
    lines.append({"user": "bob", "messages": [ask, answer], "notes": "What I say is: I see."})
    lines.append({"user": "cy", "messages": [ask, {"role": "assistant", "content": "I see " * 9}], "notes": "N"})
    untrained = [ask, {"role": "assistant", "content": "No!", "weight": 0}, ask, answer | {"weight": 1}]
    lines.append({"user": "dee", "messages": untrained, "notes": "N"})
    source = write_lines(tmp_path / "logs.jsonl", lines)
    rows = rows_of(tmp_path, source, "--persona_column", "notes", "--max_words", 9)
    found = [(row["user"], row["completion"][0]["content"]) for row in rows]
    assert found == [("ann", "I see."), ("bob", "I see."), ("dee", "I see.")]
    assert rows[-1]["prompt"][1] == {"role": "assistant", "content": "No!"}
    assert summary(tmp_path)["left_out"] == {
        "a message before the reply has no text (a tool, an image)": 2,
        "the prompt or the response holds '<persona>'": 1,
        "the response is longer than 9 words (`max_words`)": 1,
        "a reply with the weight 0, which is not to be trained": 1,
    }


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_text_is_left_out_and_the_others_are_the_history(tmp_path, capsys):
    posts = [
        {"author": "ann", "title": "Linen", "body": "Linen is strong, and I sew it."},
        {"author": "ann", "title": "Indigo", "body": "Indigo dyes linen, as I do."},
        {"author": "ann", "title": "", "body": "one two three four five six seven eight nine ten eleven twelve"},
        {"author": "ann", "title": "A copy", "body": "He wrote: linen is STRONG, and I sew it."},
        {"author": "bob", "title": "Alone", "body": "There is nothing else of me."},
        {"author": "eve", "title": "Once", "body": "I wrote this and no other text."},
        {"author": "eve", "title": "Twice", "body": "As I said: I wrote this and no other text."},
    ]
    rows = {row["id"]: row for row in rows_of(tmp_path, write_lines(tmp_path / "posts.jsonl", posts), "--k", 9)}
    assert summary(tmp_path)["left_out"] == {
        "the user wrote nothing else, or nothing earlier": 1,
        "what else the user wrote holds the response or is not earlier": 1,
    }
    del rows["6"]  # of "Twice", whose response the other text does not hold
    assert [*rows] == ["0", "1", "2", "3"]
    assert {*rows["1"]["persona"].split("\n\n")} == {
        f"{p['title']}\n{p['body']}".strip() for p in posts[:4] if p != posts[1]
    }
    assert "He wrote" not in rows["0"]["persona"]  # which quotes the response
    assert rows["0"]["prompt"][0]["content"].endswith('under the title "Linen".')
    assert rows["2"]["prompt"][0]["content"].endswith(
        'begins with "one two three four five six seven eight nine ten".'
    )
    assert rows["2"]["completion"][0]["content"] == "eleven twelve"
    assert "No column of times" in capsys.readouterr().out


def test_a_folder_of_mails(tmp_path):
    for index in range(4):
        mail = EmailMessage()
        mail["From"], mail["Subject"] = "Ann <Ann@Example.com>", "Re: dinner"
        mail["Date"] = f"Mon, 0{index + 1} Jan 2024 10:00:00 +0000"
        mail.set_content(
            f"At number {index}, call 030 123456{index}.\n\nOn Friday, Bob wrote:\n> When?\n-- \nAnn Sig\n"
        )
        (tmp_path / "mails").mkdir(exist_ok=True)
        (tmp_path / "mails" / f"{9 - index}.eml").write_bytes(bytes(mail))
    rows = rows_of(tmp_path, tmp_path / "mails", "--mask_secrets", "--retrieval", "recency")
    texts = [f"At number {index}, call [phone]." for index in range(4)]
    assert [row["completion"][0]["content"] for row in rows] == texts[1:]
    assert rows[2]["persona"] == "\n\n".join(f"Re: dinner\n{text}" for text in texts[2::-1])
    assert "ann@example.com" not in str(rows) and len({row["user"] for row in rows}) == 1
    assert summary(tmp_path)["secrets"] == {"phone": 4, "texts": 4, "masked": True}


def test_secrets_in_options_are_masked(tmp_path):
    options = ["Write to ann@example.com.", "Write a letter."]
    record = {
        "preference": "I like mail.",
        "question": "What now?",
        "response": "Write.",
        "options": options,
        "answer": 0,
    }
    lines = [{**record, "preference": f"I like mail {index}."} for index in range(6)]
    rows = rows_of(
        tmp_path,
        write_lines(tmp_path / "p.jsonl", lines),
        "--format",
        "preferences",
        "--mask_secrets",
        "--retrieval",
        "recency",
    )
    assert rows and all(row["options"] == ["Write to [email].", "Write a letter."] for row in rows)


# ── what always holds ────────────────────────────────────────────────────────────────────────────────────────────────

names = st.sampled_from([f"user {index}" for index in range(9)])
said = st.sampled_from(["yes", "no", "I sew linen in the evening now", "I sail to Osaka with a new mast", "who knows"])
posts = st.lists(st.tuples(names, said, st.integers(2000, 2006)), min_size=4, max_size=30)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(tmp_path, lines, **kwargs) -> Preparation | None:
    source = write_lines(tmp_path / "drawn.jsonl", lines)
    try:
        return Preparation(PrepareArguments(source=[source], **kwargs))
    except ValueError as error:
        assert "No row is left" in str(error) or "none is left to train on" in str(error)
        return None


@quick
@given(posts=posts, seed=st.integers(0, 5), with_groups=st.booleans())
def test_no_user_is_in_two_splits(tmp_path, posts, seed, with_groups):
    lines = [
        {"user": user, "text": f"{text} {place}", "title": "T", "chat": int(user[-1]) // 2, "notes": "N"}
        for place, (user, text, _) in enumerate(posts)
    ]
    kwargs = {"conversation_column": "chat", "format": "flat"} if with_groups else {}
    made = load(tmp_path, lines, seed=seed, test_size=0.3, persona_column="notes", **kwargs)
    if made is None:
        return
    users = [{row.user for row in rows} for rows in made.splits.values()]
    assert sum(map(len, users)) == len(set.union(*users)) and len(made.splits) == 3
    if with_groups:  # and no text of a user stands in the prompts of another split
        for split, rows in made.splits.items():
            elsewhere = {
                text
                for one, others in made.splits.items()
                if one != split
                for row in others
                for text in [row.response]
            }
            assert not elsewhere & {message["content"].rpartition("\n\n")[2] for row in rows for message in row.prompt}


@quick
@given(posts=posts, is_timed=st.booleans(), as_chats=st.booleans())
def test_no_history_holds_the_target_or_anything_later(tmp_path, posts, is_timed, as_chats):
    lines = []
    for place, (user, text, year) in enumerate(posts):
        text = f"{text} {place % 3}"
        line = (
            openai(user, [("user", text), ("assistant", f"so {text}")])
            if as_chats
            else {"user_id": user, "text": text, "title": f"T{place}"}
        )
        lines.append({**line, "id": place} | ({"time": year} if is_timed else {}))
    made = load(tmp_path, lines, validation_size=0.0, test_size=0.0)
    for row in made.splits["train"] if made is not None else ():
        place = int(row.id.split("/")[0])
        target, year = row.response, posts[place][2]
        for entry in row.history:
            text = entry.text
            assert target not in text
            written = [
                i for i, (user, said, _) in enumerate(posts) if user == row.user and text.endswith(f"{said} {i % 3}")
            ]
            if is_timed:  # it was written before, be it written again later
                assert any(posts[i][2] < year for i in written)
            elif as_chats:
                assert any(i < place for i in written)


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Write to ann.b+c@mail.example.org, please", ["email"]),
        ("+49 30 1234567, (555) 123-4567 or 030/123456", ["phone"] * 3),
        ("tel:+1-202-555-0143", ["phone"]),
        ("4111 1111 1111 1111 and 378282246310005", ["card"] * 2),
        ("4111 1111 1111 1112", []),  # the last digit is another
        ("on 2026-11-27 10:00, 01/02/2020, 2009-2013, 2010 2011 2012 2013", []),
        ("10.0.0.12, 1,234,567.00 $, 978-3-16-148410-0", []),
    ],
)
def test_secrets(text, kinds):
    assert [kind for kind, _, _ in find_secrets(text)] == kinds


@given(st.text("0123456789", min_size=12, max_size=18))
def test_one_last_digit_of_ten_passes_the_check(digits):
    total = sum(sum(divmod(2 * int(d), 10)) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits)))
    assert [d for d in range(10) if passes_luhn(f"{digits}{d}")] == [-total % 10]


# ── a dry run, files, errors ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_shows_rows_and_writes_nothing(tmp_path, capsys, tiny_model):
    lines = [openai(f"u{index}", notes=f"I am number {index} {'and I sew ' * 90}.") for index in range(5)]
    source = write_lines(tmp_path / "logs.jsonl", lines)
    argv = (source, "--persona_column", "notes", "--dry_run", "--retrieval", "contriever")
    assert prepare(tmp_path, *argv) == {}
    out = capsys.readouterr().out
    shown = " ".join(out.split())
    assert out.count("<persona>I am number") == out.count("</persona>") == out.count("<trained>") == 3
    assert "characters … " in out and "[user] About the user:" in out and "Nothing is written" in out
    assert "train 6 rows of 3 users" in shown and max(map(len, out.splitlines()[1:])) <= 80
    assert prepare(tmp_path, *argv, "--tokenizer", tiny_model) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert "<|im_start|>user About the user: <persona>I am number" in shown  # its chat template
    assert (
        shown.count("persona,") == 3
        and shown.count("<|im_end|> </trained>") + shown.count("<|im_end|></trained>") == 3
    )
    assert prepare(tmp_path, *argv, "--model_name_or_path", tiny_model) == {}
    out = capsys.readouterr().out
    (mean,) = re.findall(r"Weights of trained tokens \(PIR, 0.8 … 5\): ([\d.]+) in the mean", out)
    shown = re.findall(r"^train, row (\S+) of user", out, flags=re.MULTILINE)
    written = prepare(tmp_path, *[word for word in argv if word != "--dry_run"])
    examples = [row for row in written["train"] if row["id"] in shown]
    weights = [row.weights for row in PerContrast(tiny_model, args=PerContrastConfig(max_length=None)).score(examples)]
    assert float(mean) == pytest.approx(np.concatenate(weights).mean(), abs=0.006) and len(examples) == 3


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-8-sig", ()), ("utf-16", ()), ("utf-16-le", ()), ("cp1250", ("--encoding", "cp1250"))]
)
def test_encodings(tmp_path, encoding, named):
    line = json.dumps(openai("ann", [("user", "Kde?"), ("assistant", "Ve Zlíně")], notes="Píšu"), ensure_ascii=False)
    (tmp_path / "logs.jsonl").write_bytes(line.encode(encoding))
    (row,) = rows_of(tmp_path, tmp_path / "logs.jsonl", "--persona_column", "notes", *named)
    assert (row["persona"], row["completion"][0]["content"]) == ("Píšu", "Ve Zlíně")


def test_a_terminal_shows_colours():
    console = Console(force_terminal=True, color_system="truecolor", no_color=False, width=80, file=io.StringIO())
    print_legend(console)
    print_row("train", [("Me: ", ""), ("I sew", "persona"), (". ", ""), ("Linen", "trained")], console)
    persona, trained = "\x1b[30;48;2;242;193;78m", "\x1b[1;4;32m"
    shown = console.file.getvalue()
    assert f"Me: {persona}I sew\x1b[0m. {trained}Linen\x1b[0m" in shown and f"{persona}persona\x1b[0m" in shown


def test_globs_folders_and_templates(tmp_path):
    for user, notes in NOTES.items():
        write_lines(tmp_path / "logs" / f"{user}.jsonl", [openai(user, TALK[:2], notes=notes, tags=["a", "b"])])
    argv = ("--persona_template", "{notes} {tags}", "--prompt_template", "{query} I am: {persona}")
    from_folder = rows_of(tmp_path, tmp_path / "logs", *argv)
    assert rows_of(tmp_path, tmp_path / "logs" / "*.jsonl", *argv) == from_folder
    assert [row["persona"] for row in from_folder] == ["I sew. a\nb", "I sail. a\nb"]
    assert from_folder[0]["prompt"][0]["content"] == "Where to? I am: {persona}"


def test_what_others_wrote_is_not_overwritten(tmp_path, capsys):
    source = write_lines(tmp_path / "out" / "train.jsonl", [openai(user, notes="n") for user in "abc"])
    with pytest.raises(SystemExit):
        prepare(tmp_path, source, "--persona_column", "notes")
    assert "a file that is read, and would be overwritten" in capsys.readouterr().err
    assert len(Path(source).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("lines", "argv", "reason"),
    [
        (
            [openai("ann")],
            ["--user_column", "user_ids"],
            "'user_ids', which is not there. Did you mean 'user_id'? Columns that",
        ),
        ([openai("ann")], ["--persona_template", "{note}"], "`persona_template` names the column 'note'"),
        (
            [openai("ann", notes="x")],
            ["--persona_column", "notes"],
            "There is 1 user, and no two splits share one; none is left to train on",
        ),
        (
            [openai("ann", notes="")],
            ["--persona_column", "notes"],
            "No row is left of 1 records. Left out: 2: the persona",
        ),
        (
            [{"user": "a", "messages": [{"role": "user", "content": "x", "weight": 0.5}]}],
            [],
            "message 0: the weight of a message is 0.5. Write 0 (not trained) or 1",
        ),
        ([openai("a", [("boss", "x")])], [], "record 1, column 'messages', message 0: the role is 'boss'"),
        ([{"user": "a", "messages": "x"}], [], "record 1, column 'messages': it is a str and must be a list"),
        ([{"user": "a", "text": "x", "time": "soon"}], [], "record 1, column 'time': 'soon' is no date"),
        ([{"text": "x"}], [], "No column is the author's, by which splits are made. Name it with `--user_column`"),
        ([{"user": "a", "text": "x"}], ["--format", "flat"], "Neither a column of conversations nor one of times"),
        ([{"a": 1}], [], "do not tell what the records are"),
        ([openai("ann")], ["--format", "chat"], "`format` is 'chat'. Choose one of 'messages'"),
        ([openai("ann")], ["--prompt_template", "{query}"], "must hold {persona} and {query}, each once"),
        ([openai("ann")], ["--test_size", "1"], "`test_size` is 1.0. Write a share"),
        ([openai("ann")], ["--persona_colunm", "notes"], "Did you mean `persona_column`?"),
        (["x"], [], "line 1: holds str 'x'"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, capsys, lines, argv, reason):
    source = write_lines(tmp_path / "logs.jsonl", lines)
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path, source, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and reason in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    for source, reason in (
        ("no.jsonl", "There is no file"),
        ("empty", "holds no data file"),
        ("notes.docx", "known kind"),
    ):
        with pytest.raises(SystemExit):
            prepare(tmp_path, tmp_path / source)
        assert reason in capsys.readouterr().err
