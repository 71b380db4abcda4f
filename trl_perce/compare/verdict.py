# SPDX-License-Identifier: Apache-2.0

"""
From figures to the sentence that answers: does the method make the model more personal than plain fine-tuning, and is anything lost?

The rules are [`RULES`], which the report shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..reproduce.measures import SAME


MIN_USERS = 10
RULES = (
    f"Fewer than {MIN_USERS} held-out users with a persona: too few to say.",
    "More personal: the 95 % interval of the change in log-likelihood of personal tokens, against CE, lies above 0; less, if below 0; "
    "else it cannot be told.",
    "By the persona: a personal token's gain over another user's persona rises likewise. Where it does not, the likelihood may have "
    "risen by style or by what all users share.",
    f"The rest of the reply: less or more likely, if the interval of the change lies below or above 0 and reaches beyond {SAME} nats a "
    f"token; as likely, if it lies within ±{SAME}; else it cannot be told.",
    "Lost: answers to irrelevant questions with more persona words, or more told from memory of users trained on, if the change's interval "
    "lies above 0.",
    "Which tokens are personal, the untrained model decides, for all arms alike: PIR over 1 nat. Intervals are over users; with two or "
    "more seeds over seeds, too. One change in twenty would look like one by chance.",
)


def decide(
    measures: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    baseline: str,
    users: int,
    seeds: int,
    cost: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """
    The verdict, by [`RULES`].

    Args:
        measures (`Sequence[Mapping]`): From [`~findings.make_findings`].
        labels (`Mapping[str, str]`): Name of each arm, for people.
        baseline (`str`): The arm that others are compared with.
        users (`int`): Held-out users with a persona.
        seeds (`int`): Seeds of training.
        cost (`Mapping`): `"train_seconds"` of each trained arm.

    Returns:
        `dict[str, Any]`: `"answer"` (`"yes"`, `"no"`, `"unclear"` or `"too few users"`, of the last method, which is PerCE where no other is
            asked for), `"sentences"`, the first of which is the answer, `"remarks"` and `"rules"`.
    """
    by_name = {measure["name"]: measure for measure in measures}
    methods = [arm for arm in cost if arm != baseline]
    # PerCE's is the question; others are told behind it
    methods.sort(key=lambda arm: arm != "perce")
    answers, sentences = [], []
    for arm in methods:
        answer, own = _of_method(arm, by_name, labels, baseline, users, cost)
        answers.append(answer)
        sentences += own
    trained = _change(by_name, "log_likelihood/personal", baseline)
    if trained is not None and users >= MIN_USERS:
        word = {1: "likelier", -1: "less likely", 0: "not clearly likelier"}[_sign(trained)]
        sentences.append(
            f"Fine-tuning at all: with {labels[baseline]} personal tokens are {word} than to the untrained model "
            f"({_nats(trained)})."
        )
    remarks = []
    if seeds == 1:
        remarks.append(
            "One seed: another training could come out differently, which no interval here tells. `--seeds 0 1 2` trains three."
        )
    if users < MIN_USERS:
        remarks.append(f"The figures below are of {users} users; hold out {MIN_USERS} or more.")
    return {"answer": answers[0], "sentences": sentences, "remarks": remarks, "rules": [*RULES]}


def _of_method(arm, by_name, labels, baseline, users, cost) -> tuple[str, list[str]]:
    name, other = labels[arm], labels[baseline]
    if users < MIN_USERS:
        return "too few users", [
            f"Too few users to say whether {name} is more personal than {other}: {users} are held out, and it takes {MIN_USERS}."
        ]
    personal = _change(by_name, "log_likelihood/personal", arm)
    if personal is None:
        return "unclear", [
            f"It cannot be told whether {name} is more personal than {other}: no token of the held-out replies is personal to the "
            "untrained model."
        ]
    gain, begin = _change(by_name, "gain/personal", arm), f"On your {users} held-out users "
    sign = _sign(personal)
    if sign > 0 and gain is not None and _sign(gain) > 0:
        answer = "yes"
        first = (
            f"{begin}{name} uses the persona more than {other}: personal tokens are likelier ({_nats(personal)}), by the user's own "
            f"persona and not by another's ({_nats(gain)})."
        )
    elif sign > 0:
        answer = "unclear"
        first = (
            f"{begin}{name} makes personal tokens likelier than {other} does ({_nats(personal)}), but not clearly by the persona: the "
            f"gain over another user's is {'not known' if gain is None else _nats(gain)}."
        )
    elif sign < 0:
        answer = "no"
        first = (
            f"{begin}{name} uses the persona less than {other}: personal tokens are less likely ({_nats(personal)})."
        )
    else:
        answer = "unclear"
        first = f"{begin}it cannot be told whether {name} uses the persona more than {other}: personal tokens changed by {_nats(personal)}."
    sentences = [first, *_lost(arm, name, by_name)]
    seconds = [cost[one]["train_seconds"] for one in (arm, baseline)]
    if all(seconds) and sum(seconds[1]) > 0:
        sentences.append(
            f"Its training took {sum(seconds[0]) / sum(seconds[1]):.2f} times as long as that with {other}."
        )
    return answer, sentences


def _lost(arm: str, name: str, by_name: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What happened to the rest of the reply, and what turned up where it should not."""
    sentences = []
    rest = _change(by_name, "log_likelihood/other", arm)
    if rest is not None and rest["interval"] is not None:
        low, high = rest["interval"]
        if -SAME <= low and high <= SAME:
            said = "is as likely as before"
        elif _sign(rest):
            said = "is less likely" if high < 0 else "is likelier"
        else:
            said = "may be as likely as before or not, which cannot be told"
        sentences.append(f"The rest of the reply {said} ({_nats(rest)}).")
    found = []
    if (share := _change(by_name, "irrelevant/share", arm)) is not None and _sign(share) > 0:
        found.append(
            f"persona words in {100 * share['difference']:.0f} of 100 more answers in which they have no place"
        )
    if (leak := _change(by_name, "leak", arm)) is not None and _sign(leak) > 0:
        found.append(f"more told from memory of users trained on (personal tokens without any persona: {_nats(leak)})")
    asked = [
        what
        for measure, what in (
            ("irrelevant/share", "persona words turn up no more often where they have no place"),
            ("leak", "no more is told from memory of users trained on"),
        )
        if measure in by_name
    ]
    if found:
        sentences.append(f"What was lost with {name}: {'; '.join(found)}.")
    elif asked:
        sentences.append(f"No clear harm: {', and '.join(asked)}.")
    return sentences


def _change(by_name: Mapping[str, Mapping[str, Any]], name: str, arm: str) -> Mapping[str, Any] | None:
    return by_name[name]["changes"].get(arm) if name in by_name else None


def _sign(change: Mapping[str, Any]) -> int:
    """1 or −1 where the interval lies above or below 0, else 0."""
    if change["interval"] is None:
        return 0
    low, high = change["interval"]
    return 1 if low > 0 else -1 if high < 0 else 0


def _nats(change: Mapping[str, Any]) -> str:
    text = f"{change['difference']:+.2f} nats a token"
    if change["interval"] is not None:
        low, high = change["interval"]
        text += f" [{low:+.2f}, {high:+.2f}]"
    return text.replace("-", "−")
