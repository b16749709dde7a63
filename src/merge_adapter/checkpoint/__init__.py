"""Reading and writing checkpoints: safetensors in row blocks, indexes, pickled weights as input."""
