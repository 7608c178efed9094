"""How far engine and trainer are apart, and what of it is rounding, routing, and old weights."""
