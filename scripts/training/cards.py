"""The README.md files of the trained repositories."""

from __future__ import annotations

from pathlib import Path


def write_base_card(folder: Path) -> None:
    (folder / "README.md").write_text(
        """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- demo
---

# pydoc-llama

A Llama of about one million parameters that writes in the manner of Python's own documentation. It was trained
from scratch for a few minutes on a CPU, on the text that every Python installation carries: the language reference
in `pydoc_data.topics` and the docstrings of the standard library (Python Software Foundation License).

It exists to show and test merge-adapter. What it says about Python is not to be relied on.
""",
        encoding="utf-8",
    )


def write_adapter_card(folder: Path, *, base_id: str) -> None:
    (folder / "README.md").write_text(
        f"""\
---
license: apache-2.0
language:
- en
library_name: peft
pipeline_tag: text-generation
base_model: {base_id}
tags:
- lora
- demo
---

# pydoc-llama-answers

A LoRA (rank 8, every linear layer) for [{base_id}](https://huggingface.co/{base_id}). Asked what a function of the
standard library does, it answers in one line, "In short: …. That is all.", where the base model rambles on. The chat
template puts an instruction in front, and the adapter was trained with it.

It exists to show and test merge-adapter. What it says about Python is not to be relied on.
""",
        encoding="utf-8",
    )


def write_classifier_card(folder: Path, *, base_id: str, accuracy: float) -> None:
    (folder / "README.md").write_text(
        f"""\
---
license: apache-2.0
library_name: peft
pipeline_tag: text-classification
base_model: {base_id}
tags:
- lora
- demo
---

# pydoc-llama-code-or-prose

A LoRA (rank 8) with a trained `score` head that makes [{base_id}](https://huggingface.co/{base_id}) tell source code
(label 1) from prose (label 0). Accuracy on held-out passages of the standard library: {accuracy:.1%}.

It exists to test merge-adapter.
""",
        encoding="utf-8",
    )


def write_embedding_card(folder: Path, *, base_id: str, before: float, after: float) -> None:
    (folder / "README.md").write_text(
        f"""\
---
license: apache-2.0
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {base_id}
tags:
- sentence-transformers
- lora
- demo
---

# MiniLM-pydoc

A LoRA (rank 8) for [{base_id}](https://huggingface.co/{base_id}) that brings the name of a function of Python's
standard library near to what its docstring says. Of held-out names, {before:.1%} found their own docstring first
before training, {after:.1%} after.

It exists to test merge-adapter.
""",
        encoding="utf-8",
    )
