"""From edits of a model's parameters to changes of the tensors on disk: groups, ties, heads, vocabularies."""
