"""Merge a PEFT adapter into its base model, prove the result equivalent, publish it on the Hugging Face Hub."""

__version__ = "1.0.0"
