"""Token ids as text, for APIs that take text only.

Every id stands for one short English word, about a token in any vocabulary. So texts share prefixes
exactly where their token ids do, and their lengths in tokens are nearly what was drawn; the server's
usage has the true ones.
"""

from collections.abc import Sequence
from typing import TypeAlias

Message: TypeAlias = dict[str, str]
"""`role` and `content`."""

COMMON = """
the of and to in is that it was for on are as with his they at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if
will up other about out many then them these so some her would make like him into time has look
two more write go see number no way could people my than first water been call who oil its now
find long down day did get come made may part over new sound take only little work know place
year live me back give most very after thing our just name good sentence man think say great
where help through much before line right too mean old any same tell boy follow came want show
also around form three small set put end does another well large must big even
"""
WORDS = tuple(COMMON.split())


def text_of(tokens: Sequence[int]) -> str:
    """A text with one word for each token id."""
    return " ".join(WORDS[token % len(WORDS)] for token in tokens)
