"""The code blocks of the README, and of that in deploy/: each is run by a test, which takes it with
`block`.

Blocks of the language `text` are pictures, outputs and files that no test here can run.
"""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
DEPLOY = Path(__file__).parent / "deploy/README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TAKEN: set[str] = set()


def blocks(path: Path = README) -> list[tuple[str, str]]:
    """All that are to be run: language and text."""
    return [found for found in BLOCK.findall(path.read_text()) if found[0] != "text"]


def files() -> list[str]:
    """The texts of the language `text`."""
    return [text for language, text in BLOCK.findall(README.read_text()) if language == "text"]


def block(words: str, path: Path = README) -> str:
    """The text of the one block that holds `words`."""
    [found] = [text for _, text in blocks(path) if words in text]
    TAKEN.add(found)
    return found


def lines() -> list[str]:
    return README.read_text().splitlines()


def section(title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    _, _, rest = README.read_text().partition(f"\n{title}\n")
    return rest.partition("\n#")[0]
