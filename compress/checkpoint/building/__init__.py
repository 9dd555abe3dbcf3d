"""Networks from names: the closed list of builders, their arguments checked, nothing downloaded or opened."""
