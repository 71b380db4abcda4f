"""Weights of messages: by hand, from pieces of the text."""

import copy
import math

import pytest
from datasets import Dataset, IterableDataset

from conftest import CHATML, GENERATION, make_tiny_model
from trl_perce import PerCETrainer, PersonaError
from trl_perce.scoring.preparation import Preparation


def user(content, **weight):
    return {"role": "user", "content": content, **weight}


def assistant(content, **weight):
    return {"role": "assistant", "content": content, **weight}


TALK = [
    user("<persona>I sew 🧵.</persona> What to buy?", weight=0),
    assistant("A needle.", weight=2.5),
    user("And then?"),
    assistant("No more.", weight=0),
    assistant("Linen!", weight=0.5),
    user("Thanks."),
    assistant("Any time 🧵."),
]
# Text and weight of what is trained; 0 is not
PIECES = [
    ("<|im_start|>user\nI sew 🧵. What to buy?<|im_end|>\n<|im_start|>assistant\n", 0),
    ("A needle.<|im_end|>", 2.5),
    ("\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n", 0),
    ("No more.<|im_end|>", 0),
    ("\n<|im_start|>assistant\n", 0),
    ("Linen!<|im_end|>", 0.5),
    ("\n<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n", 0),
    ("Any time 🧵.<|im_end|>", 1),
    ("\n", 0),
]


def by_hand(pieces, tokenizer):
    """Tokens and weights of a text, 0 where nothing is trained."""
    encoded = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    weights = [weight for text, weight in pieces for _ in text]
    return encoded["input_ids"], [weights[start] for start, _ in encoded["offset_mapping"]]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_weights_of_messages_are_those_of_their_trained_tokens(make_args, tokenizer):
    pair = {"prompt": [TALK[0], assistant("A needle."), TALK[2]], "completion": TALK[3:]}
    # Without marks in the template, a line break belongs to the turn; of a completion all is trained
    turns = [[text, weight] for text, weight in PIECES]
    for index in (1, 3, 5, 7):
        turns[index][0] += "\n"
        turns[index + 1][0] = turns[index + 1][0][1:]
    whole = [("".join(text for text, _ in turns[:3]), 0), (turns[3][0], 0), ("".join(t for t, _ in turns[4:6]), 0.5)]
    whole += [("".join(text for text, _ in turns[6:]), 1)]
    for template, row, pieces in ((GENERATION, {"messages": TALK}, PIECES), (CHATML, {"messages": TALK}, turns)):
        own = with_template(tokenizer, template)
        trainer = PerCETrainer(
            make_tiny_model("llama"),
            make_args(token_weighting="given", max_length=None, max_steps=1),
            train_dataset=IterableDataset.from_generator(lambda row=row: iter([row])),
            eval_dataset={"talk": Dataset.from_list([row, row]), "pair": Dataset.from_list([pair])},
            processing_class=own,
        )
        found = [*trainer.train_dataset, *trainer.eval_dataset["talk"], *trainer.eval_dataset["pair"]]
        for example, expected in zip(found, [pieces] * 3 + [whole], strict=True):
            ids, weights = by_hand(expected, own)
            assert example["input_ids"] == ids
            assert example["labels"] == [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
            assert len(example["token_weights"]) == len(ids)
            assert [
                0 if label == -100 else weight
                for weight, label in zip(example["token_weights"], example["labels"], strict=True)
            ] == weights


def test_a_message_of_weight_0_is_not_trained_with_any_weighting(make_args, tokenizer, caplog):
    own = with_template(tokenizer, GENERATION)
    rows = [{"messages": TALK[:1] + [assistant("No.", weight=0)] + TALK[2:3] + [assistant("Yes.", weight=1)]}]
    (scored,) = Preparation(own, make_args(max_length=None))(Dataset.from_list(rows), "a").dataset
    assert own.decode([label for label in scored["labels"] if label != -100]) == "Yes.<|im_end|>"
    assert own.decode(scored["input_ids"]).count("No.") == 1
    args = make_args(token_weighting="uniform", max_length=None)
    data = Dataset.from_list([*rows, {"messages": TALK}])
    trainer = PerCETrainer(make_tiny_model("llama"), args, train_dataset=data, processing_class=own)
    assert trainer.train_dataset[0]["labels"] == scored["labels"]
    assert "train dataset: 1 of 2 rows have weights, which `token_weighting='uniform'` does not use." in caplog.text


# Renders the last reply otherwise than those before it
LAST = CHATML.replace(
    "message['content'] + ", "message['content'] + ('</s>' if loop.last and message['role'] == 'assistant' else '') + "
)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [user("a"), assistant("b", weight=-1)]}, r"message 1 of 'messages' \('assistant'\) has .*-1"),
        ({"messages": [user("a"), assistant("b", weight=math.nan)]}, "the 'weight' nan. Write 0"),
        (
            {"messages": [user("a"), assistant("b", weight=0)]},
            "all that would be trained in 'messages' has the 'weight' 0",
        ),
        (
            {"messages": [user("a", weight=2.0), assistant("b")]},
            r"\('user'\) has the 'weight' 2.0, and is not trained",
        ),
        (
            {"prompt": [user("a"), assistant("b", weight=0.5), user("c")], "completion": [assistant("d")]},
            "message 1 of 'prompt' .* is not trained",
        ),
        (
            {"prompt": [user("a")], "completion": [assistant("b", weight=0)]},
            "trained in 'completion' has the 'weight' 0",
        ),
        (
            {"prompt": [user("a")], "completion": [assistant("b", weight=2), assistant("c")]},
            "the 'weight' of message 2 cannot be told apart",
        ),
    ],
)
def test_weights_that_do_not_fit(make_args, tokenizer, row, reason):
    model = make_tiny_model("llama") if "told apart" in reason else "no/such-model"
    with pytest.raises(PersonaError, match=f"train dataset, row 0: .*{reason}"):
        PerCETrainer(
            model,
            make_args(token_weighting="given"),
            train_dataset=Dataset.from_list([row]),
            processing_class=with_template(tokenizer, LAST),
        )
