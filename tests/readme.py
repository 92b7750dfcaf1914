"""The code blocks of the README, and of that in deploy/: each is run by a test, which takes it with
`block`.  And what the README is made of: sections, folded parts, words.

Blocks of the language `text` are pictures and outputs, which no test can run.
"""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
DEPLOY = Path(__file__).parent / "deploy/README.md"
EVIDENCE = Path(__file__).parent / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FOLD = re.compile(r"<details>\n<summary>(.*?)</summary>\n(.*?)</details>", re.S)
TAKEN: set[str] = set()


def blocks(path: Path = README) -> list[tuple[str, str]]:
    """All that are to be run: language and text."""
    return [found for found in BLOCK.findall(path.read_text()) if found[0] != "text"]


def block(words: str, path: Path = README) -> str:
    """The text of the one block that holds `words`."""
    [found] = [text for _, text in blocks(path) if words in text]
    TAKEN.add(found)
    return found


def lines(path: Path = README) -> list[str]:
    return path.read_text().splitlines()


def section(title: str, path: Path = README) -> str:
    """What stands under a heading, up to the next one of any level."""
    _, _, rest = path.read_text().partition(f"\n{title}\n")
    return rest.partition("\n#")[0]


def fold(title: str) -> str:
    """What is folded under a title."""
    [found] = [text for summary, text in FOLD.findall(README.read_text()) if summary == title]
    return str(found)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found[2:]]


def unfolded(text: str) -> str:
    """What a reader sees who opens nothing: of a folded part its title."""
    return FOLD.sub(r"\1", text)


def word_count(text: str) -> int:
    """The words of prose, tables and code, marks of headings and lists among them."""
    for mark in (r"</?\w+>", r"(?<=\])\(\S+?\)", r"\|"):
        text = re.sub(mark, " ", text)
    return len(text.split())


def anchors(path: Path) -> set[str]:
    """What a link may have after #: GitHub's names of headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
