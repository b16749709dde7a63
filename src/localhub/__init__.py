"""A Hugging Face Hub on localhost, for tests and for the demo."""
