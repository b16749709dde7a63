"""How the models that ship with the project were trained; `scripts/train_models.py` runs it all."""
