"""Several adapters as PEFT's `add_weighted_adapter` makes them one, their tensors made when they are read."""
