"""`python -m claude_cli_bridge`."""

from .bridge import main

if __name__ == "__main__":
    main()
