# SPDX-License-Identifier: Apache-2.0

"""TRL's parser with a help that one finds one's way in."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser


def titles_of_recipe() -> dict[type, str]:
    """Titles for a command that takes the recipe of a training: of what it shares with it, in the order of the help."""
    from trl_perce import PerCEConfig, PerContrastConfig

    return {
        PerContrastConfig: "PerContrast",
        PerCEConfig: "PerCE",
        ScriptArguments: "data",
        ModelConfig: "model, adapter and quantization",
        SFTConfig: "of a recipe: TRL's SFT",
        TrainingArguments: "of a recipe: Transformers' trainer",
        DatasetMixtureConfig: "mixture of datasets",
    }


class GroupedParser(TrlParser):
    """
    TRL's parser, whose help has a group for each class that declares arguments.

    Args:
        dataclass_types (`tuple[type, ...]`): As for [`~trl.TrlParser`]: what is parsed, in the order in which it is returned.
        titles (`dict[type, str]`): Title of the group of a class and of those between it and the next one here that it inherits
            from. In the order of the help.
        **kwargs: As for [`~argparse.ArgumentParser`]. `usage` is set: hundreds of options in a row tell nothing.
    """

    def __init__(self, dataclass_types: tuple[type, ...], titles: dict[type, str], **kwargs):
        self._titles = titles
        self._title_of = {
            field.name: self._find_title(cls, field.name) for cls in dataclass_types for field in fields(cls)
        }
        self._group_of: dict[str, Any] = {}
        super().__init__(dataclass_types, usage="%(prog)s [--config FILE] [--option value ...]", **kwargs)

    def _find_title(self, cls: type, name: str) -> str:
        title = self._titles[cls]
        for base in cls.__mro__:
            title = self._titles.get(base, title)
            if name in vars(base).get("__annotations__", {}):  # which is where it has its default from
                break
        return title

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        # YAML reads `no` and `yes` as truth values
        for name, value in config.items():
            if name.endswith("_strategy") and isinstance(value, bool):
                if value:
                    raise ValueError(f"`{name}` is {value}. Write 'epoch', 'steps' or 'no'.")
                config[name] = "no"
        return super().set_defaults_with_config(**config)

    def add_argument(self, *names, **kwargs):
        title = self._title_of.get(kwargs.get("dest") or names[0].lstrip("-"))
        if title is None:
            return super().add_argument(*names, **kwargs)
        if not self._group_of:
            self._group_of = {title: self.add_argument_group(title) for title in self._titles.values()}
        return self._group_of[title].add_argument(*names, **kwargs)
