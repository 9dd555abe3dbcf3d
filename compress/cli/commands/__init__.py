"""One module a command, imported when it is called; each hands its options to the public function of that name."""
