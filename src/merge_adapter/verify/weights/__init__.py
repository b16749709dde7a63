"""The weights, modules and mutants parts: each tensor against an oracle computed apart from the merge."""
