"""The methods, one file each: its rule, its named function, its card and its paper."""
