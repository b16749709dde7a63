"""Every other method: PEFT's own layers, run on one module at a time."""
