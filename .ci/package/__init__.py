"""A local server that answers the Anthropic Messages API with the claude CLI.

`async with serve(Config()) as bridge: ...` runs it inside another asyncio program;
`python -m claude_cli_bridge` is the program.
"""

from .bridge import Bridge, Config, ConfigError, __version__, serve

__all__ = ["Bridge", "Config", "ConfigError", "__version__", "serve"]
