"""The code blocks of the README: each is run by a test, which takes it with `block`."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TAKEN: set[str] = set()


def blocks() -> list[tuple[str, str]]:
    """All of them: language and text."""
    return BLOCK.findall(README.read_text())


def block(words: str) -> str:
    """The text of the one block that holds `words`."""
    [found] = [text for _, text in blocks() if words in text]
    TAKEN.add(found)
    return found
