"""`python cli.py …` from a checkout is `compress …`."""

from compress.cli import entry

entry()
