#!/usr/bin/env -S python3 -E -S
"""The stand-in for the claude CLI: see stand_in.py, a module so that Python keeps it compiled.
Without `site`, of which it needs nothing, it starts in half the time."""

import sys

if "--version" in sys.argv:
    print("2.1.260 (stand-in for Claude Code)")
    sys.exit()

from stand_in import main

main()
