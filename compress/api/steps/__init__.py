"""What a run goes through, in the order of `running.run`: widths, budget, cut, recovery, measures, what is told."""
