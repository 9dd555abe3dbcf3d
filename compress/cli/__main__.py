"""`python -m compress.cli …` is `compress …`."""

from compress.cli import entry

entry()
