# SPDX-License-Identifier: Apache-2.0

"""Configuration of `trl-perce prepare`. Each field is an option of the command."""

from dataclasses import dataclass, field
from string import Formatter

from ..benchmarks.reading import take_choice
from ..persona.marks import PLACEHOLDER


# What this package reads itself, and the formats of its benchmarks, which come in splits already
LOGS = ("messages", "conversations", "flat", "pairs", "texts")
BENCHMARKS = ("rows", "reviews", "posts", "chats", "preferences", "longlamp", "lamp")


@dataclass
class SourceArguments:
    """
    Where the records are, and which column is what. A column that is not given is looked for by its usual names.

    Parameters:
        source (`list[str]`): Files, folders or globs; for `longlamp` also `hub`.
        format (`str`, *optional*): `messages` (OpenAI), `conversations` (ShareGPT), `flat` (one message a record), `pairs` (a
            prompt and a response a record), `texts` (of one author each), or one of a benchmark.
        encoding (`str`, *optional*): Of text files. By default told from each file.
    """

    source: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or globs: JSON lines, JSON, CSV, TSV, Parquet, .eml, .mbox, .txt."},
    )
    format: str | None = field(
        default=None,
        metadata={
            "help": "Chats: messages (OpenAI), conversations (ShareGPT), flat (one message a record), pairs (prompt and response). "
            "texts (mails, posts: leave one out). Of benchmarks: "
            + ", ".join(BENCHMARKS)
            + ". By default told from the columns."
        },
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text files, such as cp1252. By default told from each file."}
    )
    user_column: str | None = field(default=None, metadata={"help": "Column that tells users apart."})
    text_column: str | None = field(default=None, metadata={"help": "Column of a text, or of a flat log's message."})
    title_column: str | None = field(default=None, metadata={"help": "Column of a text's title or subject."})
    time_column: str | None = field(default=None, metadata={"help": "Column of the time: nothing later is history."})
    role_column: str | None = field(
        default=None,
        metadata={"help": "Flat logs: column with user and assistant. Without it, each speaker's replies are rows."},
    )
    conversation_column: str | None = field(
        default=None, metadata={"help": "Flat logs: column that tells conversations apart."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Pairs: column of the prompt."})
    response_column: str | None = field(default=None, metadata={"help": "Pairs: column of the response."})
    gap_hours: float = field(
        default=8.0,
        metadata={"help": "Flat logs without a conversation column: silence after which a new one begins."},
    )
    task: str | None = field(
        default=None, metadata={"help": "Of longlamp (abstract_generation, …) or lamp (LaMP_4, …)."}
    )
    setting: str = field(default="user", metadata={"help": "Of longlamp: user or temporal."})


@dataclass
class PersonaArguments:
    """
    What the persona is: a column, a template, or, without both, what the user wrote before.

    Parameters:
        persona_column (`str`, *optional*): Column with a text, or a list of texts, about the user.
        persona_template (`str`, *optional*): Text with names of columns in braces.
        retrieval (`str`, *optional*, defaults to `"bm25"`): As [`~trl_perce.history.retrieval.Retriever`] takes it.
        k (`int`, *optional*, defaults to `4`): Entries of the history that a row gets.
    """

    persona_column: str | None = field(
        default=None,
        metadata={
            "help": "Column about the user, a text or a list. Without it the persona is what the user wrote before."
        },
    )
    persona_template: str | None = field(
        default=None, metadata={"help": "Persona made of columns, such as 'About {name}: {notes}'."}
    )
    retrieval: str = field(
        default="bm25",
        metadata={"help": "How a history's entries are found: bm25, contriever, recency, random, or an encoder."},
    )
    k: int = field(default=4, metadata={"help": "Entries of the history that a row gets at most."})
    max_history: int = field(default=500, metadata={"help": "Entries to retrieve from: the latest so many."})


@dataclass
class RowArguments:
    """
    Which rows are made.

    Parameters:
        replies (`str`, *optional*, defaults to `"all"`): A row for each reply of a conversation, or for the `"last"`.
        prompt_template (`str`, *optional*): Text with `{persona}` and `{query}` that becomes the first message.
        mask_secrets (`bool`, *optional*, defaults to `False`): Whether mail addresses, phone and card numbers are masked.
    """

    replies: str = field(default="all", metadata={"help": "A row for each reply (all), or for a conversation's last."})
    turns: int = field(default=6, metadata={"help": "Messages before the reply that a prompt holds at most."})
    rows_per_user: int | None = field(default=None, metadata={"help": "Rows of a user at most, sampled."})
    num_rows: int | None = field(default=None, metadata={"help": "Of benchmarks: rows a split at most, sampled."})
    max_words: int | None = field(default=None, metadata={"help": "Leave out longer responses."})
    opening_words: int = field(
        default=10, metadata={"help": "Texts without a title: the prompt gives the first so many words."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Wording of the first message, with {persona} and {query}."}
    )
    mask_secrets: bool = field(
        default=False, metadata={"help": "Write [email], [phone] and [card] for what looks like one."}
    )


@dataclass
class OutputArguments:
    """
    Splits, and where they are written.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"data"`): Gets `train.jsonl`, …, and `prepare.json`.
        validation_size (`float`, *optional*): Share of the users; by default 0.1. Benchmarks have splits of their own.
        test_size (`float`, *optional*, defaults to `0.1`): Share of the users.
        seed (`int`, *optional*, defaults to `0`): Of the split, of samples and of `retrieval="random"`.
        dry_run (`bool`, *optional*, defaults to `False`): Show three rows and what is left out, and write nothing.
        tokenizer (`str`, *optional*): Of a dry run: name or folder of the model whose tokens are shown.
        model_name_or_path (`str`, *optional*): Of a dry run: model that scores the rows that are shown.
    """

    output_dir: str = field(default="data", metadata={"help": "Folder of train.jsonl, …, and prepare.json."})
    validation_size: float | None = field(
        default=None,
        metadata={
            "help": "Share of the users whose rows are for validation (0.1). Of a benchmark, of its training users."
        },
    )
    test_size: float = field(default=0.1, metadata={"help": "Share of the users whose rows are for the test."})
    splits: list[str] | None = field(
        default=None, metadata={"help": "Of benchmarks: splits to write. By default those that there are."}
    )
    seed: int = field(default=0, metadata={"help": "Of the split by users and of samples."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show three rows as a model sees them, and what is left out; write nothing."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Of a dry run: name or folder of the model whose tokens are shown."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Of a dry run: model that scores the rows, whose PIR and weights are shown. It is loaded."},
    )


@dataclass
class PrepareArguments(OutputArguments, RowArguments, PersonaArguments, SourceArguments):
    """
    All that `trl-perce prepare` takes.

    Raises:
        `ValueError`: A value is out of its range, or two do not go together; the message says what to write instead.
    """

    def __post_init__(self):
        if not self.source:
            raise ValueError(
                "No file is given. Write files, folders or globs first: `trl-perce prepare logs.jsonl …`."
            )
        if self.format is not None:
            take_choice(self.format, "format", (*LOGS, *BENCHMARKS))
        for name in ("tokenizer", "model_name_or_path"):
            if getattr(self, name) is not None and not self.dry_run:
                raise ValueError(
                    f"`{name}` is for `dry_run`, and nothing that is written depends on it. Leave it out."
                )
        take_choice(self.replies, "replies", ("all", "last"))
        for name in ("turns", "k", "max_history", "opening_words", "rows_per_user", "num_rows", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. Write 1 or more.")
        for name in ("validation_size", "test_size"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value}. Write a share of the users, such as 0.1, or 0 for none.")
        if (self.validation_size or 0) + self.test_size >= 1:
            raise ValueError("`validation_size` and `test_size` leave no users to train on. Write smaller shares.")
        if self.gap_hours <= 0:
            raise ValueError(f"`gap_hours` is {self.gap_hours}. Write a positive number of hours.")
        if self.persona_column and self.persona_template:
            raise ValueError("Both `persona_column` and `persona_template` are given. Leave one out.")
        if self.persona_template is not None and not placeholders(self.persona_template, "persona_template"):
            raise ValueError("`persona_template` names no column. Write one in braces, as in 'About {name}: {notes}'.")
        if self.prompt_template is not None:
            text = self.prompt_template
            if text.count(PLACEHOLDER) != 1 or text.count("{query}") != 1:
                raise ValueError(f"`prompt_template` is {text!r}. It must hold {{persona}} and {{query}}, each once.")
        for split in self.splits or ():
            take_choice(split, "splits", ("train", "validation", "test"))
        own = self.format in ("longlamp", "lamp")
        if (
            self.format in BENCHMARKS
            and self.validation_size
            and (own or "validation" not in (self.splits or ["validation"]))
        ):
            raise ValueError(
                f"`validation_size` is given, and {f'{self.format!r} has a split of its own' if own else 'no `validation` is among the `splits`'}. "
                "Leave out the one or the other."
            )
        if own and len(self.source) > 1:
            raise ValueError(f"`format` {self.format!r} takes one folder, and {len(self.source)} sources are given.")
        if self.format in ("longlamp", "lamp") and self.task is None:
            raise ValueError(
                f"`format` {self.format!r} needs `task`: abstract_generation, … of longlamp, LaMP_4, … of lamp."
            )


def placeholders(template: str, name: str) -> list[str]:
    """
    Names in braces of a template.

    Args:
        template (`str`): Such as `"About {name}: {notes}"`. A doubled brace is a brace.
        name (`str`): Of the argument, for the message.

    Raises:
        `ValueError`: A brace is not closed, or holds no name.
    """
    try:
        names = [column for _, column, _, _ in Formatter().parse(template) if column is not None]
    except ValueError as error:
        raise ValueError(f"`{name}` is {template!r}: {error}. Write a brace that is meant as one twice.") from None
    if "" in names:
        raise ValueError(f"`{name}` is {template!r}: a pair of braces holds no name of a column.")
    return names
