# SPDX-License-Identifier: Apache-2.0

"""Which words of a text carry content: no model, no data to download, the same everywhere."""

import re


# What stays when apostrophes and hyphens part words is in here too ("don", "t"); numerals are no content words either
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither both all any some no none such another other others what which
    whose who whom whoever whatever whichever i you he she it we they me him her us them my your his its our their mine yours
    hers ours theirs myself yourself himself herself itself ourselves yourselves themselves one ones oneself someone somebody
    something anyone anybody anything everyone everybody everything nobody nothing there here
    about above across after against along among around as at before behind below beneath beside besides between beyond by
    despite down during except for from in inside into like near of off on onto opposite out outside over past per plus since
    than through throughout till to toward towards under underneath until unto up upon via with within without
    and but or nor so yet if unless because although though while whereas whether when whenever where wherever why how
    be am is are was were been being do does did doing done have has had having can could may might must shall should will
    would ought not n t s m re ve ll d don doesn didn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn mustn ain
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million
    """.split()
)


def content_words(text: str) -> list[tuple[int, int]]:
    """
    Character spans of the content words of a text, in order. A content word is a run of letters, digits and underscores that
    has a letter and is not in a list of English function words and numerals. In other languages function words count too, and
    where words are not parted by spaces (Chinese, Japanese, Thai) a run is no word: these need another measure.

    Args:
        text (`str`): The text.
    """
    words = re.finditer(r"\w+", text)
    return [
        word.span() for word in words if word.group().lower() not in FUNCTION_WORDS and not word.group().isnumeric()
    ]
