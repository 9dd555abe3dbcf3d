"""`python cli.py …` from a checkout is `compress …`."""

from compress.__main__ import entry

entry()
