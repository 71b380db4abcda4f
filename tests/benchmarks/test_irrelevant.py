import json
import re
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from trl_perce.benchmarks import histories
from trl_perce.benchmarks.irrelevant import ask_irrelevant, load
from trl_perce.benchmarks.persona_qa import load_rows
from trl_perce.benchmarks.reading import Skips
from trl_perce.cli.main import main
from trl_perce.evaluation.arguments import GenerationArguments
from trl_perce.evaluation.predictions import make_prompts
from trl_perce.history.entries import to_examples
from trl_perce.persona.marks import PersonaError, mark_persona
from trl_perce.persona.rows import find_bad_row


SHARED = ROOT.parent / "shared" / "data"
QUERIES = ["What should I eat?", "which film now:", "Recommend a book.\nBe quick!", "And where to?"]
PERSONAS = ["I sew.", "I sail a lot", "I cook; my name is {Ann}."]
QUESTIONS = {one["id"]: one for one in load()}
ANSWER = [{"role": "assistant", "content": "Fine."}]


def chat(*turns) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def made_of(prompt, **more) -> list[dict]:
    """A row for each persona and query: `prompt(persona, query)`."""
    rows = [{"persona": persona, "prompt": prompt("{persona}", query)} for persona in PERSONAS for query in QUERIES]
    completion = "Fine." if isinstance(rows[0]["prompt"], str) else ANSWER
    return [{**row, "completion": completion, **more} for row in rows]


def with_markers(rows: list[dict]) -> list[dict]:
    """The same rows with the persona in markers."""

    def filled(value, persona):
        if isinstance(value, str):
            return value.replace("{persona}", f"<persona>{persona}</persona>")
        return [{**message, "content": filled(message["content"], persona)} for message in value]

    return [{"prompt": filled(row["prompt"], row["persona"]), "completion": row["completion"]} for row in rows]


def test_the_questions():
    questions = load()
    assert Counter(Counter(one["topic"] for one in questions).values()) == {10: 10}
    assert len({one["question"] for one in questions}) == len({one["id"] for one in questions}) == 100
    assert questions[12]["id"] == "units/3"
    for one in questions:
        assert 1 <= len(one["answer"].split()) <= 40 and one["answer"] == one["answer"].strip(), one
        assert not re.search(r"persona|\{|<", one["question"] + one["answer"]), one
        # Of nobody in particular
        assert not re.search(r"\b(my|mine|your|yours|we|our)\b", one["question"]), one


def test_the_figures_are_right():
    figures = {
        **{
            "arithmetic/1": 17 * 24,
            "arithmetic/2": 240 * 15 // 100,
            "arithmetic/3": "5/8",
            "arithmetic/4": 180 * 2 // 5,
        },
        **{"arithmetic/5": (28 + 7) // 5, "arithmetic/6": 196**0.5, "arithmetic/7": f"{7} times {91 // 7}"},
        **{"arithmetic/8": sum(range(51)), "arithmetic/9": 2 * 3 * 7, "arithmetic/10": 9 * 6, "units/1": 5 * 1.609344},
        **{
            "units/2": (68 - 32) * 5 / 9,
            "units/3": 24 * 60 * 60,
            "units/4": 2500,
            "units/5": 74 * 2.54,
            "units/6": 1500,
        },
        **{"units/7": 1e4 / 4046.8564224, "units/8": 90 / 3.6, "units/9": 180 / 3, "units/10": 28.349523125},
        **{
            "code/1": len("hello"),
            "code/3": 7 // 2,
            "code/8": sum(n * n for n in range(1, 11)),
            "history/9": 1453 - 1337,
        },
    }
    for name, figure in figures.items():
        shown = figure if isinstance(figure, str) else f"{figure:.2f}".rstrip("0").rstrip(".")
        assert re.search(rf"(?<![\d.]){shown}(?![\d])", QUESTIONS[name]["answer"]), name


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("About me: {persona}\n\n", "\nAnswer:"),
        ("### About me\n{persona}\n\n### Question: ", "\n\n### Answer:\n"),
        ("{persona}\n", ""),
        ("Here is a user.\n\n{persona}\n\nBe kind.", None),  # an instruction goes with the query
        ("", "\n\n(About me: {persona})\n\nAnswer:"),
        ("Question: ", "\nPersona: {persona}\nAnswer:"),
        ("", "\n{persona}"),
        ("", "\n{persona}\n\nBe brief."),
        ("", "\n({persona})"),
        ("Me: {persona} | ", " (in a word)"),
        ("关于我：{persona}。", " Be brief."),
        ("<|im_start|>system\n{persona}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("[INST] <<SYS>>\nHome: {persona}\n\nWork: {persona}\n<</SYS>>\n\n", " [/INST]"),
    ],
)
def test_texts(before, behind):
    rows = made_of(lambda persona, query: f"{before}{' ' if behind is None else ''}{query}{behind or ''}")
    if behind is None:
        before, behind = before.removesuffix("Be kind."), ""
    for own in (rows, with_markers(rows)):
        skips = Skips()
        made = ask_irrelevant(own, skips=skips)
        assert not skips.counts
        for row in made:
            persona = "{persona}"
            if own is not rows:
                persona = re.search("<persona>.*?</persona>", row["prompt"])[0]
                assert persona[9:-10] in PERSONAS
            question = QUESTIONS[row["id"]]["question"]
            assert row["prompt"] == (before + question + behind).replace("{persona}", persona)
            assert row["completion"] == QUESTIONS[row["id"]]["answer"]


@pytest.mark.parametrize("in_parts", [False, True])
def test_conversations(in_parts):
    def asked(*turns, queries=None) -> set[tuple[tuple[str, str], ...]]:
        rows = made_of(lambda persona, query: chat(*((role, text.replace("{query}", query)) for role, text in turns)))
        rows = rows if queries is None else rows[:queries]
        for row in rows if in_parts else ():
            for message in row["prompt"]:
                message["content"] = [{"type": "text", "text": message["content"]}]
        made = ask_irrelevant(rows, num_questions=12)
        assert {row["persona"] for row in made} == {row["persona"] for row in rows}
        texts = [
            [(m["role"], m["content"][0]["text"] if in_parts else m["content"]) for m in row["prompt"]] for row in made
        ]
        questions = [QUESTIONS[row["id"]]["question"] for row in made]
        assert all(
            sum(text.count(question) for _, text in own) == 1 for own, question in zip(texts, questions, strict=True)
        )
        return {
            tuple((role, text.replace(question, "…")) for role, text in own)
            for own, question in zip(texts, questions, strict=True)
        }

    user, answer, query = ("user", "About me: {persona}"), ("assistant", "Noted."), ("user", "{query}")
    system, ask = ("system", "Be kind. Of the user: {persona}"), ("user", "…")
    assert asked(system, query) == {(system, ask)}
    assert asked(system, ("user", "Hi, {query}"), answer, query) == {(system, ask)}
    # The persona begins the conversation, with a query or without one
    assert asked(("user", "You are:\n{persona}\n\n{query}"), answer, query) == {
        (("user", "You are:\n{persona}\n\n…"),)
    }
    assert asked(user, answer, ("user", "Old?"), answer, query) == {(user, answer, ask)}
    assert asked(query, ("system", "{persona}")) == {(ask, ("system", "{persona}"))}
    assert asked(user, answer, query, queries=1) == {(user, answer, ask)}
    assert asked(("user", "Old?"), answer, user, ("user", "Old?"), query) == {(user, ask)}
    assert asked(("user", "You are:\n{persona}\n\n{query}"), answer, query, queries=1) == {
        (("user", "You are:\n{persona}\n\n…"),)
    }
    assert asked(("user", "{persona}, by the way"), answer, query) == {
        (("user", "{persona}, by the way"), answer, ask)
    }
    assert asked(("system", "Be kind."), ("user", "Old?"), answer, ("user", "{query}\n\nI am: {persona}")) == {
        (("system", "Be kind."), ("user", "…\n\nI am: {persona}"))
    }


words = st.text("abcäé", min_size=1, max_size=6)
lines = st.lists(words, min_size=1, max_size=5).map(" ".join)
personas = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.lists(personas, min_size=1, max_size=4),
    st.lists(st.tuples(lines, lines), min_size=2, max_size=4),
    st.sampled_from(["", "Of me: ", "I tell you\n", "# Me\n", "[me] "]),
    st.sampled_from(["\n", "\n\n", ".\n\nQuestion: ", "\n---\n"]),
    st.sampled_from(["", "\nAnswer:", "\n\n"]),
    st.booleans(),
    st.sampled_from(["text", "user", "system"]),
    st.booleans(),
)
def test_the_query_goes_and_all_else_stays(data, texts, queries, heading, join, ending, is_behind, form, is_marked):
    # Queries differ at both ends, and are told from what is shared by their numbers
    queries = [f"{number} {first}{between}{second} {number}" for number, (first, second) in enumerate(queries)
               for between in [data.draw(st.sampled_from(["\n", "? ", " "]))]]  # fmt: skip
    mark = "<persona>{}</persona>" if is_marked else "{{persona}}"
    rows = []
    for number, query in enumerate(queries):
        persona = texts[number % len(texts)]
        held = heading + mark.format(persona)
        if form == "system":
            prompt = chat(("system", held), ("user", query + ending))
        else:
            text = held + join + query + ending if is_behind else query + "\n\n" + held + ending
            prompt = text if form == "text" else chat(("user", text))
        row = {"prompt": prompt, "completion": "Yes." if form == "text" else ANSWER, "user": str(number)}
        rows.append(row if is_marked else {**row, "persona": persona})
    try:
        for row in rows:
            mark_persona(json.loads(json.dumps(row)))
    except PersonaError:
        assume(False)
    skips = Skips()
    made = ask_irrelevant(rows, num_questions=len(rows), skips=skips)
    assert not skips.counts
    for row in made:
        question, persona = QUESTIONS[row["id"]]["question"], texts[int(row["user"]) % len(texts)]
        held = heading + mark.format(persona)
        text = held + join + question + ending if is_behind else question + "\n\n" + held + ending
        expected = {
            "text": text,
            "user": chat(("user", text)),
            "system": chat(("system", held), ("user", question + ending)),
        }
        assert row["prompt"] == expected[form]


def test_who_is_asked_what():
    rows = made_of(lambda persona, query: f"About me: {persona}\n\n{query}")
    for number, row in enumerate(rows):
        row |= {"user": number % 5, "id": "old", "options": ["a"], "answer": 0, "tools": None}
        row |= {"chat_template_kwargs": {"enable_thinking": False}}
    made = ask_irrelevant(rows, seed=3)
    assert [*made[0]] == ["id", "topic", "user", "persona", "chat_template_kwargs", "prompt", "completion"]
    assert {row["id"]: row["topic"] for row in made} == {one["id"]: one["topic"] for one in load()}
    assert {*Counter(row["user"] for row in made).values()} == {20}
    # With each user's own personas, and with all of them
    own = {(row["user"], row["persona"]) for row in rows}
    assert {(row["user"], row["persona"]) for row in made} == own
    assert made == ask_irrelevant(rows, seed=3) != ask_irrelevant(rows, seed=4)
    assert len({row["user"] for row in ask_irrelevant(rows, num_questions=5)}) == 5
    assert ask_irrelevant(rows, seed=3, num_questions=7) == made[:7]
    firsts = [ask_irrelevant(rows, seed, num_questions=1)[0] for seed in range(20)]
    assert len({row["user"] for row in firsts}) == 5 and len({row["id"] for row in firsts}) > 5
    assert find_bad_row(made) is None
    # Without names, personas tell users apart
    unnamed = [{name: row[name] for name in ("persona", "prompt", "completion")} for row in rows]
    assert {*Counter(row["persona"] for row in ask_irrelevant(unnamed)).values()} == {33, 34}
    assert {*Counter(row["prompt"].split("\n")[0] for row in ask_irrelevant(with_markers(unnamed))).values()} == {
        33,
        34,
    }
    # A completion goes on with the space that it has
    (row,) = ask_irrelevant([{**unnamed[0], "completion": " ok"}], num_questions=1)
    assert row["completion"] == " " + QUESTIONS[row["id"]]["answer"]
    # A line break that is marked with the persona
    lines = with_markers(made_of(lambda persona, query: f"{persona}{query}"))
    lines = [{**row, "prompt": row["prompt"].replace("</persona>", "\n</persona>")} for row in lines]
    skips = Skips()
    assert all(
        "\n</persona>" + QUESTIONS[row["id"]]["question"] in row["prompt"]
        for row in ask_irrelevant(lines, skips=skips)
    )
    assert not skips.counts
    # One query alone
    one = [row | {"prompt": "About me: {persona}\n\nWhat now?\nBe quick.\nAnswer:"} for row in rows]
    row = ask_irrelevant(one)[0]
    assert row["prompt"] == f"About me: {{persona}}\n\n{QUESTIONS[row['id']]['question']}\nAnswer:"
    for number in (0, 101):
        with pytest.raises(ValueError, match=f"`num_questions` is {number}. Write a number from 1 to 100"):
            ask_irrelevant(rows, num_questions=number)


def test_rows_that_cannot_be_used_are_counted(caplog):
    usable = made_of(lambda persona, query: chat(("user", f"About me: {persona}\n\n{query}")))
    others = [
        {"persona": "", "prompt": usable[0]["prompt"]},
        {"persona": "I sew.", "prompt": chat(("user", "What would suit {persona} and me?"))},
        {"persona": "I sew", "prompt": chat(("user", "Of {persona} what follows?"))},
        {"persona": "I sew.", "prompt": chat(("user", "{persona}"))},
        {
            "prompt": chat(
                ("user", "<persona>I sew.</persona>\nHi"), ("assistant", "Ho"), ("user", "<persona>I</persona>?")
            )
        },
        {"prompt": chat(("user", "About me: <persona>A</persona> and cats, <persona>B</persona>\n\nHi"))},
        {"persona": "I sew.", "prompt": chat(("system", "{persona}"), ("assistant", "Hi"))},
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<persona>I</persona> Hi"}]}
            ]
        },
    ]
    skips = Skips()
    made = ask_irrelevant(usable + [{**row, "completion": ANSWER} for row in others], skips=skips)
    assert len(made) == 100 and {row["persona"] for row in made} == {*PERSONAS}
    assert skips.counts == {
        "no persona": 1,
        "a persona inside of the query": 3,
        "no query beside the persona": 1,
        "a persona in several turns, or in one that is not the user's": 1,
        "no message of the user": 1,
        "a message that is not text alone": 1,
    }
    ask_irrelevant([*usable, {**others[0], "completion": ANSWER}])
    assert "1 rows, whose query cannot be replaced by another question, were left out: no persona (1)." in caplog.text


def test_messages_are_a_prompt_and_a_completion():
    rows = made_of(lambda persona, query: chat(("system", f"About me: {persona}"), ("user", query)))
    talks = [{"persona": row["persona"], "messages": row["prompt"] + row["completion"]} for row in rows]
    assert ask_irrelevant(talks) == ask_irrelevant(rows)


@pytest.mark.parametrize(
    "text",
    [
        "Recommend something for {persona} to {query}",
        "{query}, dear {persona}",
        # The same words in all rows: which of them are the query?
        "What now?\n\nAbout me: {persona}\n\nAnswer me:",
        "Recommend a dish for this person:\n{persona}\nAnswer:",
        "{persona}",
    ],
)
def test_no_row_can_be_used(text):
    with pytest.raises(PersonaError, match="a line break between it and the query, as in 'About me: {persona}"):
        ask_irrelevant(made_of(lambda persona, query: text.replace("{query}", query)))


def test_unclear_rows_are_named():
    rows = made_of(lambda persona, query: f"About me: {persona}\n\n{query}")
    with pytest.raises(PersonaError, match="^row 12: .* is not closed"):
        ask_irrelevant([*rows, {"prompt": "<persona>I", "completion": "Fine."}])
    with pytest.raises(ValueError, match="^row 0: it needs 'prompt' and 'completion', or 'messages'; it has 'text'"):
        ask_irrelevant([{"text": "Hi"}])
    with pytest.raises(PersonaError, match="^row 0: the conversation ends with a message of 'user'"):
        ask_irrelevant([{"messages": chat(("user", "Hi"))}])
    with pytest.raises(PersonaError, match="replaced by another question: there is no row. Write"):
        ask_irrelevant([])


@pytest.mark.parametrize(
    ("name", "format", "lead"),
    [
        ("persona_chat", "chats", "You are this person:"),
        ("prefeval", "preferences", "About me:"),
        ("product_reviews", "reviews", "Past reviews of a reviewer:"),
        ("forum_posts", "posts", "Past posts of an author:"),
    ],
)
def test_rows_of_histories(name, format, lead):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the data in {SHARED}")
    rows = histories.load("test", SHARED / name, format, num_rows=60)
    rows = to_examples(rows, [range(min(2, len(row.history))) for row in rows])
    skips = Skips()
    for row in ask_irrelevant(rows, skips=skips):
        question = QUESTIONS[row["id"]]["question"]
        assert row["prompt"] == chat(("user", f"{lead}\n\n{{persona}}\n\n{question}"))
    assert not skips.counts


def test_the_rows_of_the_package_are_evaluated(tokenizer):
    made = ask_irrelevant(load_rows(("test",)))
    assert len({row["persona"] for row in made}) == 17
    prompts = make_prompts(made, tokenizer, GenerationArguments(use_cpu=True, max_length=None))
    for row, prompt in zip(made, prompts, strict=True):
        one = QUESTIONS[row["id"]]
        assert (prompt.persona, prompt.reference) == (row["persona"], one["answer"])
        assert prompt.query == f"About me: …\n{one['question']}" and any(prompt.persona_mask)


@pytest.mark.parametrize("format", ["chats", "texts"])
def test_rows_that_prepare_writes(tmp_path, format):
    talk = [("user", "Where to? {}"), ("assistant", "Osaka."), ("user", "Why {}?"), ("assistant", "For the needles.")]
    logs = [
        {"user_id": f"u{number}", "messages": chat(*((role, text.format(number)) for role, text in talk))}
        if format == "chats"
        else {
            "user": f"u{number % 4}",
            "title": f"Day {number}",
            "text": f"It rained {number} times.",
            "time": number + 1990,
        }
        for number in range(12)
    ]
    more = [log | {"notes": f"I am {number}."} for number, log in enumerate(logs)] if format == "chats" else logs
    (tmp_path / "logs.jsonl").write_text("".join(json.dumps(log) + "\n" for log in more))
    argv = ["--persona_column", "notes"] if format == "chats" else []
    main(["prepare", str(tmp_path / "logs.jsonl"), *argv, "--output_dir", str(tmp_path / "out")])
    rows = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text().splitlines()]
    skips = Skips()
    lead = "About the user:\n" if format == "chats" else "What this author wrote before:\n\n"
    for row in ask_irrelevant(rows, skips=skips):
        assert row["prompt"] == chat(("user", f"{lead}{{persona}}\n\n{QUESTIONS[row['id']]['question']}"))
    assert not skips.counts
