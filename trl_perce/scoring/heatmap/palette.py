# SPDX-License-Identifier: Apache-2.0

"""
The colours of a PIR, one palette for page, picture and terminal.

Purple where the persona makes a token less likely, orange where it makes it more likely, a pair that colour-blind readers tell
apart. A personal token is underlined too.
"""

import math


# Colours of the most negative, of no and of the most positive PIR, and of the text on all of them
PALETTE = {
    "light": {"negative": "#9c8fd6", "neutral": "#ffffff", "positive": "#f2892b", "text": "#1b1b1f"},
    "dark": {"negative": "#6b54c0", "neutral": "#1c1d22", "positive": "#b05204", "text": "#f4f4f6"},
}
# PIR of the full colour, in nats: the upper clipping bound of the paper
SCALE = 5.0
# Under 1, so that a token that is just personal (1 nat) has a third of the full colour and not a fifth
EXPONENT = 0.7


def colour(pir: float, theme: str = "light") -> str:
    """
    The background of a token: from neutral at 0 to the full colour at [`SCALE`] nats.

    Args:
        pir (`float`): In nats. NaN is neutral.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`.

    Returns:
        `str`: Colour as `"#rrggbb"`. The theme's text on it has a contrast of 4.5 at least (WCAG AA).
    """
    palette = PALETTE[theme]
    strength = 0.0 if math.isnan(pir) else min(abs(pir) / SCALE, 1.0) ** EXPONENT
    full = palette["negative" if pir < 0 else "positive"]
    channels = zip(bytes.fromhex(palette["neutral"][1:]), bytes.fromhex(full[1:]), strict=True)
    return "#" + "".join(f"{round(start + (end - start) * strength):02x}" for start, end in channels)
