"""What the terminal shows: tables, progress, and the spelling that it can show."""
