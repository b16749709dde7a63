"""What a repository holds beside its weights' values: files, config, tokenizer, processors, provenance."""
