"""Base, base + adapter and merged model, opened from their files by transformers and PEFT themselves."""
