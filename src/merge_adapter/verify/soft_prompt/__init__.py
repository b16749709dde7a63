"""The gate for a soft prompt that became tokens of the vocabulary."""
