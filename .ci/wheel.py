"""What a wheel holds, for hatchling (pyproject.toml): .ci/package and the three files of the
checkout, as one package.

The three files choose their imports when they run, so that they work beside a script as well as
inside a package.  A type checker always reads the first choice, and that one names modules which
are not there when the package is installed.  So in a wheel a type checker never reads it; all
lines keep their numbers.  (`if False` is not enough: mypy follows the imports behind it.)
"""

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "claude_cli_bridge"
OWN = ("__init__.py", "__main__.py")
# How many choices of imports there are in each file.
CHOICES = {"bridge.py": 1, "sessions.py": 1, "translate.py": 0}
CHOICE = "\nif TYPE_CHECKING or not __package__:\n"
CHOSEN = "\nif not TYPE_CHECKING and not __package__:\n"
# What `pip install -e .` installs instead: the three files stay where they are.
IMPORTS = "\nfrom .bridge import "
IN_PLACE = "\n__path__.append({root!r})\n" + IMPORTS


class Wheel(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and name each with its place in the wheel."""
        root = Path(self.root)
        files = {name: read(root / ".ci/package" / name) for name in OWN}
        is_editable = version == "editable"
        if is_editable:
            # Without py.typed: a type checker would find half of it.
            in_place = IN_PLACE.format(root=self.root)
            files["__init__.py"] = replaced(files["__init__.py"], IMPORTS, in_place, 1)
        else:
            files["py.typed"] = ""
            for name, number in CHOICES.items():
                files[name] = replaced(read(root / name), CHOICE, CHOSEN, number)
        self.folder = tempfile.TemporaryDirectory()
        key = "force_include_editable" if is_editable else "force_include"
        places = build_data[key]
        for name, text in files.items():
            path = Path(self.folder.name) / name
            path.write_text(text, encoding="utf-8")
            places[str(path)] = f"{PACKAGE}/{name}"

    def finalize(
        self, version: str, build_data: dict[str, Any], artifact_path: str
    ) -> None:
        self.folder.cleanup()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def replaced(text: str, old: str, new: str, number: int) -> str:
    """The text with `new` for `old`, which must be there that many times."""
    if text.count(old) != number:
        raise ValueError(
            f"see .ci/wheel.py: not {number} times in a file: {old.strip()}"
        )
    return text.replace(old, new)
