"""What `trl-perce compare` finds, made up: everything that its reports have to show, hostile texts among it."""

from typing import Any


SCRIPT = "<script>alert(1)</script> </style> <!-- {{ cost }} {% if %} &amp; \u2028 'x' \"y\" [bold]b[/bold] **c** | \x1b[31m"
ARABIC = "أحب الشعر والكتب القديمة \u202eabc"
CHINESE = "我喜欢做针线活,周末常去布料市场。"
LONG = "I sew most evenings, mostly for my two daughters, and I buy linen at the market. " * 30 + "The End."
ADDRESS = "https://example.org/" + "a" * 300


def _measure(
    name, group, title, unit, better, means, changes, rows=240, users=42, note="What it is, in one sentence.", same=0.0
):
    """Means of untrained, CE, PerCE, and the changes of CE and PerCE, each with its interval or without."""
    arms = ("untrained", "ce", "perce")
    against = {"ce": "untrained", "perce": "ce"}
    return {
        **{"name": name, "group": group, "title": title, "unit": unit, "better": better, "note": note, "same": same},
        **{"rows": rows, "users": users},
        "arms": {
            arm: {"mean": mean, "interval": None if users < 2 else [mean - 0.1 * abs(mean), mean + 0.1 * abs(mean)]}
            for arm, mean in zip(arms, means, strict=True)
        },
        "changes": {
            arm: {"against": against[arm], "difference": difference, "interval": interval}
            for arm, (difference, interval) in zip(("ce", "perce"), changes, strict=True)
        },
    }


def _pieces(text: str) -> list[list]:
    """Words with made-up PIRs, from −6 to 6 nats, and the spaces between them."""
    pieces: list[list] = []
    for index, word in enumerate(text.split(" ")):
        pieces += [[" ", None]] if index else []
        pieces.append([word, [0.2, 3.1, -0.4, 1.4, 0.0, 6.5, -1.2, -6.0, 0.6, 0.9][index % 10]])
    return pieces


def _answer(row: int, user: str | None, persona: str, query: str, reference: str, texts: list[str]) -> dict[str, Any]:
    answers = {
        arm: {"text": text, "pieces": _pieces(text)}
        for arm, text in zip(("untrained", "ce", "perce"), texts, strict=True)
    }
    return {"row": row, "user": user, "persona": persona, "query": query, "reference": reference, "answers": answers}


def example_findings() -> dict[str, Any]:
    """Two seeds, 42 users, two trained arms."""
    measures = [
        _measure(
            *("log_likelihood/personal", "use", "Personal tokens", "nats", "higher"),
            *((-3.214, -3.021, -2.878), ((0.193, [0.121, 0.270]), (0.143, [0.0517, 0.2044]))),
            note="Log-likelihood of the tokens of your users' own replies that depend on the persona, a token.",
        ),
        _measure(
            *("gain/personal", "use", "… over another's persona", "nats", "higher"),
            *((1.81, 2.02, 2.131), ((0.21, [0.1, 0.33]), (0.111, [0.021, 0.199]))),
            note="How much likelier a personal token is with the user's own persona than with another user's.",
        ),
        _measure(
            *("uptake/own", "use", "Words of the persona", "words", "higher"),
            *((2.96, 1.44, 1.83), ((-1.52, [-1.9, -1.1]), (0.39, [-0.04, 0.83]))),
            *(48, 20),
        ),
        _measure(
            *("log_likelihood/other", "lost", "Other tokens", "nats", "higher"),
            *((-2.55, -2.31, -2.352), ((0.24, [0.2, 0.28]), (-0.0421, [-0.0618, -0.0223]))),
            note="Log-likelihood of all other tokens of your users' own replies, a token.",
            same=0.05,
        ),
        _measure(
            *("log_likelihood/personal_swapped", "lost", "Personal, another's persona", "nats", None),
            *((-5.02, -5.04, -5.009), ((-0.02, [-0.1, 0.06]), (0.0315, [-0.05, 0.11]))),
            note="The personal tokens, where the prompt has another user's persona: what is likelier here needs no persona.",
        ),
        _measure(
            *("leak", "lost", "… of users trained on", "nats", "lower"),
            *((-5.3, -5.1, -5.043), ((0.2, None), (0.0571, None))),
            *(60, 1),
        ),
        _measure(
            *("irrelevant/share", "irrelevant", "Answers with persona words", "share", "lower"),
            *((0.052, 0.031, 0.094), ((-0.021, [-0.05, 0.008]), (0.063, [0.0211, 0.1049]))),
            *(100, 100),
        ),
        _measure(
            *("options/likelihood", "options", "The right one is likeliest", "share", "higher"),
            *((0.292, 0.346, 0.375), ((0.054, [0.01, 0.1]), (0.0292, [-0.0104, 0.0688]))),
        ),
        _measure(
            *("options/pir", "options", "The right one gains most", "share", "higher"),
            *((0.412, 0.412, 0.412), ((0.0, [0.0, 0.0]), (0.0, [0.0, 0.0]))),
        ),
        _measure(
            *("rougeL", "answers", "ROUGE-L", "score", "higher"),
            *((0.121, 0.153, 0.156), ((0.032, [0.01, 0.05]), (0.003, [-0.01, 0.016]))),
            *(48, 20),
        ),
        _measure(
            *("num_tokens", "answers", "Length", "tokens", None),
            *((128.0, 23.4, 26.15), ((-104.6, [-108, -101]), (2.75, [0.4, 5.1]))),
            *(48, 20),
        ),
    ]
    answers = [
        _answer(
            *(3, "u7", "I sew. I have two daughters. I buy linen at the market.", "What are you up to this weekend?"),
            "I am off to the market for linen, the girls need new dresses for school.",
            [
                "I am planning to spend the weekend at home and maybe watch a movie with friends, what about you?",
                "I am going to the market and then I will sew a dress.",
                "I will buy linen at the market and sew two dresses for my daughters, they grow so fast!",
            ],
        ),
        _answer(11, None, SCRIPT, SCRIPT, SCRIPT, [SCRIPT] * 3),
        _answer(12, "u\u202e9", ARABIC, "ماذا تقرأ الآن؟", ARABIC, [ARABIC, "أقرأ كتابا قديما", "أقرأ الشعر كل مساء"]),
        _answer(20, "用户", CHINESE, "周末做什么?", CHINESE, [CHINESE] * 3),
        _answer(31, "u31", LONG, "And you?\n\nSecond line.", LONG, [LONG, "", ADDRESS]),
    ]
    return {
        "settings": [
            ["model", "SmolLM2-135M-Instruct"],
            ["data", "data"],
            ["seeds", "0, 1"],
            ["learning rate", "5e-4"],
            ["prompt", "About me: {persona} | " + ADDRESS],
            ["versions", "trl_perce 0.1.0, trl 1.16.0, transformers 5.24.0, torch 2.13.0"],
        ],
        "data": {
            **{"train_rows": 4480, "test_rows": 240, "test_users": 42, "predicted_rows": 48, "irrelevant_rows": 100},
            "notes": ["2 rows are too long for `max_length`: left out."],
        },
        "arms": ["untrained", "ce", "perce"],
        "labels": {"untrained": "untrained", "ce": "CE", "perce": "PerCE"},
        "baseline": "ce",
        "verdict": {
            "answer": "yes",
            "sentences": [
                "On your 42 held-out users PerCE uses the persona more than CE: personal tokens are likelier (+0.14 nats [+0.05, +0.20]), "
                "by the user's own persona and not by another's (+0.11 nats [+0.02, +0.20]).",
                "The rest of the reply is less likely (−0.04 nats [−0.06, −0.02] a token).",
                "What was lost with PerCE: persona words in 6 % more answers in which they have no place.",
                "Its training took 1.68 times as long.",
                "Fine-tuning at all: with CE personal tokens are likelier than to the untrained model (+0.19 nats [+0.12, +0.27]).",
            ],
            "remarks": ["Answers are of 20 users: the others' were not generated."],
            "rules": [
                "Fewer than 10 held-out users with a persona: too few to say.",
                "More personal: the 95 % interval of the change in log-likelihood of personal tokens, against CE, lies above 0.",
            ],
        },
        "groups": [
            {"key": "use", "title": "Does it use the persona?"},
            {"key": "lost", "title": "What was lost?"},
            {"key": "irrelevant", "title": "Questions to which the persona does not matter"},
            {"key": "options", "title": "Which of the options does it choose?"},
            {"key": "answers", "title": "The answers"},
        ],
        "measures": measures,
        "answers": answers,
        "threshold": 1.0,
        "answers_rule": "one row each of 5 users, drawn with seed 0",
        "cost": {
            "ce": {"train_seconds": [61.2, 60.0], "peak_memory": {"bytes": 2 * 2**30, "of": "process"}},
            "perce": {"train_seconds": [101.8, 101.8], "peak_memory": {"bytes": 3 * 2**30, "of": "process"}},
        },
    }


def with_more_arms(findings: dict[str, Any]) -> dict[str, Any]:
    """Two more trained arms, with longer names, as `--methods` allows."""
    for arm, label in (("uniform", "PerCE, uniform weights"), ("dft", "DFT")):
        findings["arms"].insert(2, arm)  # before PerCE
        findings["labels"][arm] = label
        for measure in findings["measures"]:
            measure["arms"][arm] = measure["arms"]["perce"]
            measure["changes"][arm] = measure["changes"]["perce"]
        for answer in findings["answers"]:
            answer["answers"][arm] = answer["answers"]["ce"]
        findings["cost"][arm] = findings["cost"]["ce"]
    return findings


def with_little(findings: dict[str, Any]) -> dict[str, Any]:
    """One seed, four users, no answers, no options, no irrelevant questions, no memory, no interval anywhere."""
    left_out = ("options", "irrelevant", "answers")
    findings["measures"] = [measure for measure in findings["measures"] if measure["group"] not in left_out]
    for measure in findings["measures"]:
        for entry in (*measure["arms"].values(), *measure["changes"].values()):
            entry["interval"] = None
    findings["data"] |= {"test_users": 4, "predicted_rows": 0, "irrelevant_rows": 0, "notes": []}
    findings["answers"] = []
    for own in findings["cost"].values():
        own |= {"train_seconds": own["train_seconds"][:1], "peak_memory": None}
    findings["verdict"] |= {
        "answer": "too few users",
        "sentences": ["Too few users to say whether PerCE is more personal than CE: 4 are held out, and it takes 10."],
        "remarks": ["One seed: another training could come out differently, which no interval here tells."],
    }
    return findings
