"""ALOE: its personas, its figures against NumPy's, runs with known users, judges and models, and one with real ones."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, make_tiny_model
from rows import write_lines
from servers import needs_openai, requests_of
from trl_perce.benchmarks.aloe import (
    Aloe,
    Conversation,
    Persona,
    clean_message,
    load_personas,
    model_messages,
    recites,
    simulator_messages,
)
from trl_perce.benchmarks.aloe_metrics import alignment_levels, aloe_records, improvement, late_average, summarize
from trl_perce.benchmarks.responder import TransformersResponder
from trl_perce.cli.aloe import run
from trl_perce.evaluation.endpoint import Endpoint


pytest_plugins = ["servers"]

DATA = ROOT.parent / "shared" / "data" / "aloe"
PERSONAS = [
    Persona(f"She is a {age}-year-old welder. She keeps {age} ducks.", f"She is {trait}. She loves jokes.")
    for age, trait in ((31, "calm"), (42, "witty"), (53, "frank"))
]


# ── personas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in {"profile": ["P1\n", "P2", "P3"], "personality": ["a", "b", "c", "d"]}.items():
        write_lines(folder / f"{name}_eval.jsonl", texts)
    return folder


def test_pairs(data):
    pairs = load_personas(data, personalities=2)
    assert [(p.profile, p.personality) for p in pairs] == [(p, t) for p in ("P1", "P2", "P3") for t in ("a", "b")]
    drawn = [load_personas(data, 4, conversations=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5 and sorted(drawn[0], key=load_personas(data, 4).index) == drawn[0]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no folder {DATA}")
def test_the_hundred_of_aloe():
    personas = load_personas(DATA)
    assert len(set(personas)) == 100
    assert len({p.profile for p in personas}) == 20 and len({p.personality for p in personas}) == 5


def test_bad_files(data):
    for options, message in (
        ({"personalities": 5}, "`personalities` is 5.*1 to 4"),
        ({"personalities": 2, "conversations": 7}, "`conversations` is 7.*1 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            load_personas(data, **options)
    for line in ("not JSON", '{"profile": "x"}', '" "'):
        (data / "profile_eval.jsonl").write_text(f'"fine"\n{line}\n')
        with pytest.raises(ValueError, match="profile_eval.jsonl, line 2: expected a JSON string"):
            load_personas(data)
    (data / "profile_eval.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_personas(data)
    (data / "personality_eval.jsonl").unlink()
    (data / "profile_eval.jsonl").write_text('"fine"\n')
    with pytest.raises(FileNotFoundError, match="personality_eval.jsonl.*ShujinWu-0814/ALOE"):
        load_personas(data)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_alignment_levels():
    ratings = np.array([[1.0, 5, np.nan], [3, np.nan, np.nan]])
    assert np.array_equal(alignment_levels(ratings), [2, 5, np.nan], equal_nan=True)
    assert late_average(np.arange(1.0, 11)) == 8 and late_average(np.arange(1.0, 13)) == 8
    assert np.isnan(late_average(np.arange(1.0, 10)))


@pytest.mark.parametrize("seed", range(5))
def test_improvement_is_that_of_a_regression(seed):
    random = np.random.default_rng(seed)
    levels = random.uniform(1, 5, 10)
    levels[random.permutation(10)[: seed // 2]] = np.nan
    rounds = np.flatnonzero(np.isfinite(levels)) + 1
    known = levels[rounds - 1]
    normalised = (known - known.min()) / (known.max() - known.min())
    found = improvement(levels)
    assert found["ir"] == pytest.approx(np.polyfit(rounds, known, 1)[0])
    assert found["n_ir"] == pytest.approx(np.polyfit(rounds, normalised, 1)[0])
    residuals = normalised - np.polyval(np.polyfit(rounds, normalised, 1), rounds)
    assert found["n_r2"] == pytest.approx(1 - residuals.var() / normalised.var())
    assert found["n_r2"] == pytest.approx(np.corrcoef(rounds, known)[0, 1] ** 2)


def test_improvement_where_there_is_none():
    line = improvement(np.linspace(2, 4, 9))
    assert {name: float(value) for name, value in line.items()} == pytest.approx(
        {"ir": 0.25, "n_ir": 0.125, "n_r2": 1}
    )
    flat = improvement(np.full(10, 3.3))
    assert flat["ir"] == pytest.approx(0) and np.isnan(flat["n_ir"]) and np.isnan(flat["n_r2"])
    for levels in ([np.nan] * 4, [np.nan, 3, np.nan], [2.0]):
        assert all(np.isnan(value) for value in improvement(np.array(levels)).values())


def test_summary_of_known_ratings():
    random = np.random.default_rng(0)
    ratings = random.integers(1, 6, (400, 10)).astype(float)
    ratings[:, 3] = 4
    ratings[5, 0] = ratings[7, 0] = np.nan
    table = [[None if np.isnan(rating) else int(rating) for rating in row] for row in ratings]
    result = summarize(table)
    assert result["conversations"] == 400 and result["unparsable"] == 2
    for index, row in enumerate(result["rounds"]):
        known = ratings[:, index][np.isfinite(ratings[:, index])]
        assert row["round"] == index + 1 and row["rated"] == len(known)
        assert row["alignment"]["value"] == pytest.approx(known.mean())
        reach = 1.96 * known.std() / len(known) ** 0.5  # of the normal approximation
        assert row["alignment"]["interval"] == pytest.approx([known.mean() - reach, known.mean() + reach], abs=0.02)
    assert result["rounds"][3]["alignment"] == {"value": 4, "interval": [4, 4]}
    late = ratings[:, 5:].mean(1)
    reach = 1.96 * late.std() / 20
    assert result["alignment_late"]["value"] == pytest.approx(late.mean())
    assert result["alignment_late"]["interval"] == pytest.approx([late.mean() - reach, late.mean() + reach], abs=0.01)
    slopes = np.polyfit(range(1, 11), ratings[8:].T, 1)[0]  # the mean's slope is the mean of the slopes
    reach = 1.96 * slopes.std() / 20
    low, high = result["ir"]["interval"]
    assert high - low == pytest.approx(2 * reach, rel=0.1)
    assert low < result["ir"]["value"] < high
    assert json.loads(json.dumps(result)) == result


def test_records(caplog):
    result = summarize([[1, 3, None], [2, 5, None]])
    assert result["rounds"][2] == {"round": 3, "alignment": {"value": None, "interval": None}, "rated": 0}
    records = aloe_records(result, "m", "perce", train_task="chats", learning_rate=1e-4, clip=(0.8, 5.0), seed=1)
    assert "no value for alignment@3, alignment@6-10" in caplog.text
    assert [record["metric"] for record in records] == ["alignment@1", "alignment@2", "n_ir"]
    interval = records[0].pop("interval")
    assert interval == [1, 2]
    run = {"model": "m", "train_task": "chats", "task": "aloe", "method": "perce", "learning_rate": 1e-4}
    run |= {"clip": [0.8, 5.0], "seed": 1}
    assert records[0] == {**run, "metric": "alignment@1", "value": 1.5, "rows": 2}
    full = aloe_records(summarize([[1, 2, 3, 4, 5, 1, 2, 3, 4, 5]]), "m", "untrained")
    assert [r["metric"] for r in full] == [*(f"alignment@{k}" for k in range(1, 11)), "alignment@6-10", "n_ir"]
    assert full[10]["value"] == 3 and full[0]["train_task"] is None and full[0]["clip"] is None


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages():
    conversation = Conversation(PERSONAS[0], ["m1"], ["r1"])
    simulator = simulator_messages(conversation)
    assert [message["role"] for message in simulator] == ["user", "assistant", "user"]
    assert all(text in simulator[0]["content"] for text in (PERSONAS[0].profile, PERSONAS[0].personality))
    assert [message["content"] for message in simulator[1:]] == ["m1", "r1"]
    assert model_messages(["m1", "m2"], ["r1"]) == [
        {"role": "user", "content": "m1"},
        {"role": "assistant", "content": "r1"},
        {"role": "user", "content": "m2"},
    ]


def test_clean_message():
    assert clean_message("<think>hm</think>*smiles* Hi!\n\n**Well**, *waves*  bye. ") == "Hi! Well, bye."
    assert clean_message("*waves*") == ""


def test_recital():
    assert recites(Conversation(PERSONAS[0], ["Hi", "I mean, She keeps 31 ducks. You know?"]))
    assert not recites(Conversation(PERSONAS[0], ["Hi, I keep 31 ducks."]))


class Scripted:
    """
    A responder of known replies that keeps what it sees. Its reply tells the user's message, which tells conversation and round.
    """

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def __call__(self, conversations):
        for messages in conversations:
            if len(self.seen) == self.fail_at:
                raise KeyboardInterrupt
            self.seen.append(messages)
            yield f"<think>hm</think>\nreply to {messages[-1]['content']}"


def script(body):
    """The simulated users say who they are by number and which round it is; the judge rates the round."""
    first, last = (body["messages"][index]["content"] for index in (0, -1))
    if body["model"] == "user":
        number = next(index for index, persona in enumerate(PERSONAS) if persona.profile in first)
        return f"*nods* user {number} in round {1 + len(body['messages']) // 2}"
    assert body["model"] == "judge"
    return f"Score: {re.search(r'reply to user [0-2] in round ([1-9])', last)[1]}"


@pytest.fixture
def endpoints(echo):
    echo.reply = script
    return {
        "simulator": Endpoint(echo.url, "user", temperature=1.0, concurrency=9),
        "judge": Endpoint(echo.url, "judge", concurrency=9),
    }


@needs_openai
def test_a_run(echo, endpoints, tmp_path):
    responder = Scripted()
    result = Aloe(PERSONAS, responder, **endpoints, output_dir=tmp_path, rounds=3, settings={"model": "m"}).run()
    assert [row["alignment"]["value"] for row in result["rounds"]] == [1, 2, 3]
    assert result["ir"]["value"] == pytest.approx(1) and result["n_ir"]["value"] == pytest.approx(0.5)
    assert result["unparsable"] == result["empty_messages"] == result["empty_replies"] == result["reciting"] == 0
    assert json.loads((tmp_path / "aloe.json").read_text()) == result
    assert result["settings"]["model"] == "m" and result["settings"]["judge"]["model"] == "judge"

    # What the model sees: what was said, and nothing else
    said = [
        (f"user {number} in round {round_}", f"reply to user {number} in round {round_}")
        for round_ in (1, 2, 3)
        for number in range(3)
    ]
    expected = [
        model_messages([said[3 * r + n][0] for r in range(round_ + 1)], [said[3 * r + n][1] for r in range(round_)])
        for round_ in range(3)
        for n in range(3)
    ]
    assert sorted(responder.seen, key=str) == sorted(expected, key=str)
    seen = json.dumps(responder.seen)
    for persona in PERSONAS:
        for sentence in re.split(r"(?<=\.) ", f"{persona.profile} {persona.personality}"):
            assert sentence not in seen
    assert not {"welder", "ducks", "calm", "witty", "frank", "jokes", "Profile", "system"} & set(
        re.findall(r"\w+", seen)
    )

    lines = [json.loads(line) for line in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    assert [line["profile"] for line in lines] == [persona.profile for persona in PERSONAS]
    assert lines[1]["rounds"][2] == {
        "round": 3,
        "message": "user 1 in round 3",
        "reply": "reply to user 1 in round 3",
        "verdict": "Score: 3",
        "rating": 3,
    }
    for body in echo.bodies:  # the judge sees the persona and the last message
        if body["model"] == "judge":
            [message] = body["messages"]
            number = re.search(r"reply to user (\d)", message["content"])[1]
            assert PERSONAS[int(number)].profile in message["content"] and message["content"].count("reply to") == 1


@needs_openai
def test_unparsable_and_empty_texts_are_counted(echo, endpoints, tmp_path, caplog):
    judged = []

    def reply(body):
        if body["model"] == "user":
            return "*waves*" if "31" in body["messages"][0]["content"] else "She keeps 42 ducks."
        judged.append(body)
        return ("four", "6", "4")[len(judged) % 3]

    echo.reply = reply
    result = Aloe(PERSONAS[:2], lambda c: [""] * len(c), **endpoints, output_dir=tmp_path, rounds=3).run()
    counts = {name: result[name] for name in ("unparsable", "empty_messages", "empty_replies", "reciting")}
    assert counts["empty_messages"] == 3 and counts["empty_replies"] == 6 and counts["reciting"] == 1
    rated = sum(row["rated"] for row in result["rounds"])
    assert 0 < counts["unparsable"] < 6 and counts["unparsable"] + rated == 6
    assert all(row["alignment"]["value"] in (None, 4) for row in result["rounds"])
    assert "replies of the judge hold no rating" in caplog.text and "word for word" in caplog.text


@needs_openai
def test_a_run_goes_on_behind_any_byte(endpoints, tmp_path):
    def play(folder, responder):
        return Aloe(PERSONAS, responder, **endpoints, output_dir=folder, rounds=2).run()

    whole = play(tmp_path / "whole", Scripted())
    turns = (tmp_path / "whole" / "turns.jsonl").read_bytes()
    for end in np.random.default_rng(0).integers(len(turns), size=8):
        folder, responder = tmp_path / str(end), Scripted()
        folder.mkdir()
        (folder / "turns.jsonl").write_bytes(turns[:end])
        (folder / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
        kept = turns[:end].rpartition(b"\n")[0].count(b'"kind": "replies"')
        assert play(folder, responder) == whole
        assert len(responder.seen) == 6 - kept  # no finished turn is asked again
        for name in ("turns.jsonl", "conversations.jsonl"):
            assert sorted((folder / name).read_text().splitlines()) == sorted(
                (tmp_path / "whole" / name).read_text().splitlines()
            )
    again = Scripted()
    assert play(tmp_path / "whole", again) == whole and not again.seen
    with pytest.raises(ValueError, match="other settings: `rounds` was 2 and is 3.*`output_dir`"):
        Aloe(PERSONAS, again, **endpoints, output_dir=tmp_path / "whole", rounds=3)
    with pytest.raises(ValueError, match="`personas` was"):
        Aloe(PERSONAS[:2], again, **endpoints, output_dir=tmp_path / "whole", rounds=2)


@needs_openai
def test_an_interrupted_run_goes_on(endpoints, tmp_path):
    first, second = Scripted(fail_at=4), Scripted()
    with pytest.raises(KeyboardInterrupt):
        Aloe(PERSONAS, first, **endpoints, output_dir=tmp_path, rounds=2).run()
    Aloe(PERSONAS, second, **endpoints, output_dir=tmp_path, rounds=2).run()
    asked = [str(messages) for messages in first.seen + second.seen]
    assert len(asked) == len(set(asked)) == 6


@needs_openai
def test_a_killed_run_goes_on(echo, endpoints, tmp_path):
    program = (
        "import json, sys, time\n"
        "from trl_perce.benchmarks.aloe import Aloe, Persona\n"
        "from trl_perce.evaluation.endpoint import Endpoint\n"
        "url, folder, personas = sys.argv[1:]\n"
        "def slow(conversations):\n"
        "    for messages in conversations:\n"
        "        with open(folder + '/asked', 'a') as file: file.write(messages[-1]['content'] + '\\n')\n"
        "        time.sleep(0.1)\n"
        "        yield 'reply to ' + messages[-1]['content']\n"
        "options = {'concurrency': 9, 'cache_path': folder + '/answers.jsonl'}\n"
        "Aloe([Persona(*texts) for texts in json.loads(personas)], slow,\n"
        "     Endpoint(url, 'user', temperature=1.0, **options), Endpoint(url, 'judge', **options), folder, 9).run()"
    )
    personas = json.dumps([[persona.profile, persona.personality] for persona in PERSONAS])
    process = subprocess.Popen([sys.executable, "-c", program, echo.url, str(tmp_path), personas], cwd=ROOT)
    turns = tmp_path / "turns.jsonl"
    while not turns.exists() or turns.read_bytes().count(b"\n") < 15:  # in the second round
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = turns.read_bytes().count(b'"replies"')
    asked = (tmp_path / "asked").read_text().splitlines()
    assert kept < 27 and len(asked) - kept <= 1  # at most what was under way
    requests, responder = len(echo.texts), Scripted()
    for endpoint in endpoints.values():
        endpoint.cache_path = tmp_path / "answers.jsonl"
    result = Aloe(PERSONAS, responder, **endpoints, output_dir=tmp_path, rounds=9).run()
    assert result["conversations"] == 3 and len(responder.seen) == 27 - kept
    assert requests < len(echo.texts) and len(echo.texts) <= 54 + 3  # at most a batch was under way
    assert len({str(body) for body in echo.bodies}) == 54


# ── the model under test ─────────────────────────────────────────────────────────────────────────────────────────────


def conversations_of(*lengths):
    return [model_messages(["I sew my own dresses."] * length, ["A new set."] * (length - 1)) for length in lengths]


def test_batched_replies_are_those_of_each_alone(tokenizer):
    model = make_tiny_model("llama").eval()
    responder = TransformersResponder(model, tokenizer, temperature=0, max_new_tokens=7, batch_size=3)
    conversations = conversations_of(1, 3, 2, 1, 4)
    replies = list(responder(conversations))
    assert len(replies) == 5
    for messages, reply in zip(conversations, replies, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        for _ in range(7):  # greedy, by hand
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        start = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        assert reply == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_sampled_replies_depend_on_seed_and_batch(tokenizer):
    model, conversations = make_tiny_model("llama").eval(), conversations_of(1, 2, 3)

    def replies(conversations, seed):
        options = {"temperature": 1.0, "max_new_tokens": 9, "batch_size": 1, "seed": seed}
        return list(TransformersResponder(model, tokenizer, **options)(conversations))

    assert replies(conversations, 0) == replies(conversations, 0) != replies(conversations, 1)
    assert replies(conversations[1:], 0) == replies(conversations, 0)[1:]  # as after a kill


def test_the_oldest_messages_go_where_there_is_no_room(tokenizer, caplog):
    model = make_tiny_model("gpt2").eval()  # 256 positions
    responder = TransformersResponder(model, tokenizer, temperature=0, max_new_tokens=8)
    long = conversations_of(12)[0]
    [reply] = responder([long])
    dropped = int(re.search(r"its first (\d+) messages go", caplog.text)[1])
    assert dropped % 2 == 0 and [reply] == list(responder([long[dropped:]]))
    length = [len(tokenizer.apply_chat_template(long[start:])["input_ids"]) for start in (dropped - 2, dropped)]
    assert length[1] < 256 - 8 <= length[0] + 8


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def aloe(tiny_model, data, tmp_path, echo):
    def call(*argv, output="aloe"):
        arguments = ["--model_name_or_path", tiny_model, "--data_dir", str(data), "--judge_base_url", echo.url]
        arguments += ["--judge_model", "judge", "--simulator_model", "user", "--personalities", "2", "--rounds", "2"]
        return run([*arguments, "--max_new_tokens", "4", "--output_dir", str(tmp_path / output), *argv])

    echo.reply = lambda body: "Hello there" if body["model"] == "user" else "3"
    return call


@needs_openai
def test_the_command(aloe, echo, tmp_path, capsys):
    assert aloe("--conversations", "4") == 0
    output = capsys.readouterr().out
    assert "3.000 … 3.000" in output and "4 of 4" in output and "Improvement rate, per round: 0.000" in output
    assert "0 replies of the judge without a rating" in output
    settings = json.loads((tmp_path / "aloe" / "settings.json").read_text())
    assert settings["temperature"] == 0.4 and settings["rounds"] == 2 and settings["judge"]["temperature"] == 0
    asked = len(echo.texts)
    assert aloe("--conversations", "4") == 0 and len(echo.texts) == asked  # all is there
    with pytest.raises(SystemExit) as error:
        aloe("--conversations", "4", "--temperature", "0.7")
    assert error.value.code == 2 and "`temperature` was 0.4 and is 0.7" in capsys.readouterr().err
    assert aloe("--conversations", "4", "--temperature", "0.7", "--overwrite") == 0


@needs_openai
def test_the_command_with_a_served_model_and_a_recipe(aloe, echo, tmp_path, capsys):
    seen = []

    def reply(body):
        if body["model"] == "tested":
            seen.append(body)
            return "Hi!"
        return "Hello there" if body["model"] == "user" else "4"

    echo.reply = reply
    recipe = tmp_path / "aloe.yaml"
    recipe.write_text(f"model_base_url: {echo.url}\nconversations: 3\nmax_new_tokens: 5\n")
    assert aloe("--config", str(recipe), "--model_name_or_path", "tested") == 0
    assert "4.000" in capsys.readouterr().out
    assert seen and all(body["temperature"] == 0.4 and body["max_tokens"] == 4 for body in seen)
    assert not re.search(r"P\d|system", json.dumps([body["messages"] for body in seen]))


@needs_openai
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data_dir", "/nowhere"], "no file '/nowhere/profile_eval.jsonl'"),
        (["--conversations", "9"], "`conversations` is 9"),
        (["--rounds", "0"], "`rounds` is 0"),
        (["--roundz", "3"], "Did you mean `rounds`"),
        (["--chat_template_kwargs", "no"], "`chat_template_kwargs` is 'no'"),
        (["--model_base_url", "http://localhost:1/v1", "--adapter", "x"], "leave `model_base_url` out"),
        (["--judge_base_url", "http://me:pw@localhost/v1"], "OPENAI_API_KEY"),
    ],
)
def test_bad_arguments_exit_before_anything_is_asked(aloe, echo, capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        aloe(*argv)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not echo.texts


@needs_openai
def test_a_failing_endpoint_exits_with_its_message(aloe, echo, capsys, tmp_path):
    echo.reply = lambda body: "bad"
    with pytest.raises(SystemExit) as error:  # the model under test gets "bad", which the server refuses
        aloe("--model_base_url", echo.url)
    assert error.value.code == 1 and "no to bad" in capsys.readouterr().err


def test_real_conversations(server, smollm2, tmp_path):
    url, log = server
    before = requests_of(log)
    options = {"concurrency": 1, "max_tokens": 6, "cache_path": tmp_path / "answers.jsonl", "keep_cut": True}
    simulator, judge = (Endpoint(url, smollm2, temperature=t, **options) for t in (1.0, 0.0))
    seen = []

    def responder(conversations):
        seen.extend(conversations)
        return simulator.ask(conversations)

    result = Aloe(PERSONAS[:2], responder, simulator, judge, tmp_path, rounds=2).run()
    assert requests_of(log) - before == sum(1 for _ in open(tmp_path / "answers.jsonl")) <= 12
    assert result["unparsable"] + sum(row["rated"] for row in result["rounds"]) == 4
    lines = [json.loads(line) for line in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    assert all(turn["message"] and turn["reply"] and turn["verdict"] for line in lines for turn in line["rounds"])
    for line in lines:  # nothing but what was said
        turns = line["rounds"]
        for count in (1, 2):
            messages = [turn["message"] for turn in turns[:count]]
            assert model_messages(messages, [turn["reply"] for turn in turns[: count - 1]]) in seen
    assert len(seen) == 4
    again = Aloe(PERSONAS[:2], responder, simulator, judge, tmp_path, rounds=2).run()
    assert again == result and len(seen) == 4
