"""From a file or folder of a stranger to a network, with nothing of theirs executed."""
