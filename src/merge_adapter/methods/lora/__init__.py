"""LoRA's family in closed form, row block by row block."""
