"""The command `llm`, three times in one process."""

import contextlib
import io
import json
import shlex

from llm.cli import cli

FUNCTION = 'def get_weather(city: str):\n    "The weather of a city."\n    return f"18C in {city}"'
COMMANDS = {
    "text": "llm -m claude-sonnet-5.5 --no-stream 'SAY Once upon a time.'",
    "pieces": "llm -c 'SAY They lived happily ever after.'",
    "tool": 'llm -c \'USE_TOOL get_weather INPUT={"city": "Paris"}END\'',
}


class Terminal(io.StringIO):
    def write(self, piece: str) -> int:
        written = super().write(piece)
        pieces.append(piece)
        return written


told = {}
for name, command in COMMANDS.items():
    pieces: list[str] = []
    with contextlib.redirect_stdout(Terminal()):
        cli([*shlex.split(command)[1:], "--functions", FUNCTION], standalone_mode=False)
    told[name] = pieces if name == "pieces" else "".join(pieces)
print(json.dumps(told))
