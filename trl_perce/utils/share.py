# SPDX-License-Identifier: Apache-2.0

"""Work that the processes of `accelerate launch` share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from tqdm.auto import tqdm


T = TypeVar("T")


def _nothing() -> int:
    return 0


@dataclass(frozen=True)
class Share:
    """
    What this process does of the work of all. Batches are made as one process makes them, and dealt out whole: a row's values do not
    depend on how many processes there are.

    Attributes:
        index (`int`, *optional*, defaults to `0`): Of this process.
        count (`int`, *optional*, defaults to `1`): How many processes there are.
        elsewhere (`Callable[[], int]`, *optional*): How many rows the other processes have finished since it was last asked.
    """

    index: int = 0
    count: int = 1
    elsewhere: Callable[[], int] = _nothing

    def of(self, batches: Iterable[T]) -> Iterator[T]:
        """
        Every `count`-th batch. Those that follow each other are about equally long, so that all processes have as much to do.

        Args:
            batches (`Iterable`): All that are to be done, the same on every process.

        Yields:
            Those of this process.
        """
        return islice(batches, self.index, None, self.count)

    def bar(self, total: int | None, desc: str, disable: bool) -> tqdm:
        """
        A progress bar over the rows of all processes, which the first of them shows.

        Args:
            total (`int` or `None`): Rows of all processes, if it is known.
            desc (`str`): What is done.
            disable (`bool`): Whether there shall be none. There is none where no terminal is, either.

        Returns:
            [`~tqdm.tqdm`]: The bar, for [`~Share.advance`].
        """
        return tqdm(total=total, unit="row", desc=desc, disable=disable or self.index > 0 or None)

    def advance(self, bar: tqdm) -> None:
        """A row is finished: move the bar by it, and by those that were finished elsewhere."""
        if not bar.disable:
            bar.update(1 + self.elsewhere())


# One process does everything
EVERYTHING = Share()
