"""How each PEFT method changes a weight."""
