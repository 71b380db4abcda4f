# SPDX-License-Identifier: Apache-2.0

"""Mail addresses, phone numbers and card numbers in texts: counted, and masked where that is asked for."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator


_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}")
# Digits with single separators between them, perhaps with a plus and brackets
_NUMBER = re.compile(r"(?<![\w.,/+-])(?:\+|00)?\(?\d[\d ().\-/]{5,24}\d(?![\w%€$£])")
_DATE = re.compile(r"\d{4}([-./])\d{1,2}\1\d{1,2}(?!\d)|\d{1,2}([-./])\d{1,2}\2\d{4}(?!\d)")
# With the code of a country, with that of an area (which begins with 0), and as it is written in North America
_PHONE = re.compile(
    r"(?:\+|00)[1-9][\d ().\-/]+|\(?0[1-9]\d*[ ().\-/][\d ().\-/]+|(?:1[ .-])?\(?\d{3}\)?[ .-]?\d{3}[ .-]\d{4}|\d{3}-\d{4}"
)
_CARD = re.compile(r"(?:[3-6]|2[2-7])\d+(?:([ -])\d+)*")
_NAMES = {"email": "mail address", "phone": "phone number", "card": "card number"}


class Secrets:
    """
    Looks for what may say who somebody is, or give access to their money, in texts.

    What looks like it is counted: a mail address; 13 to 19 digits that pass the check of card numbers (Luhn); a number of 7 to 15
    digits that is written as phone numbers are (`+49 30 123456`, `030 123456`, `(555) 123-4567`) and is no date. Some that are none are counted, and some that
    are written otherwise are missed.

    Args:
        mask (`bool`): Whether `[email]`, `[phone]` and `[card]` take their place.

    Attributes:
        counts (`Counter`): How many of each kind.
        num_texts (`int`): Texts with one at least. Each text counts once, wherever it stands.
    """

    def __init__(self, mask: bool):
        self.mask = mask
        self.counts: Counter[str] = Counter()
        self.num_texts = 0
        self._seen: set[int] = set()

    def clean(self, text: str) -> str:
        """
        Count, and mask, what a text holds.

        Args:
            text (`str`): Any text.

        Returns:
            `str`: The text, masked or as it is.
        """
        found = [*find_secrets(text)]
        if found and (key := hash(text)) not in self._seen:
            self._seen.add(key)
            self.counts.update(kind for kind, _, _ in found)
            self.num_texts += 1
        if not self.mask:
            return text
        for kind, start, end in sorted(found, key=lambda one: one[1], reverse=True):
            text = f"{text[:start]}[{kind}]{text[end:]}"
        return text

    def name(self, user: str) -> str:
        """A user's name; with `mask` a hash of it where it is a mail address or a number of a phone."""
        if self.mask and any(find_secrets(user)):
            return f"user-{hashlib.blake2b(user.encode(), digest_size=6).hexdigest()}"
        return user

    def describe(self) -> str:
        """ "2 mail addresses, 1 phone number", of all texts; empty if there are none."""
        return ", ".join(
            f"{count:,} {_NAMES[kind]}{'' if count == 1 else 'es' if kind == 'email' else 's'}"
            for kind, count in sorted(self.counts.items())
        )


def find_secrets(text: str) -> Iterator[tuple[str, int, int]]:
    """
    What looks like a secret in a text.

    Args:
        text (`str`): Any text.

    Yields:
        `tuple[str, int, int]`: `"email"`, `"phone"` or `"card"`, and its half-open span of characters. They do not overlap.
    """
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield "email", *match.span()
    for match in _NUMBER.finditer(text):
        number = match[0]
        digits = re.sub(r"\D", "", number)
        if "@" in text[match.end() : match.end() + 1]:
            continue  # of an address
        if 13 <= len(digits) <= 19 and _CARD.fullmatch(number) and passes_luhn(digits):
            yield "card", *match.span()
        elif 7 <= len(digits) <= 15 and not _DATE.match(number) and _PHONE.fullmatch(number):
            yield "phone", *match.span()


def passes_luhn(digits: str) -> bool:
    """
    The check of card numbers (ISO/IEC 7812-1, annex B).

    Args:
        digits (`str`): Digits alone.
    """
    doubled = [int(digit) * (2 if index % 2 else 1) for index, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0
