#!/usr/bin/env python3
"""The stand-in for the claude CLI: see stand_in.py, a module so that Python keeps it compiled."""

from stand_in import main

main()
