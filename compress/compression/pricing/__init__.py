"""What a width costs in parameters, MACs and measured time, and the cheapest widths at a wanted total."""
