"""The methods, one file each: paper, rule, named function, and the `CARD` by which the registry finds it."""
