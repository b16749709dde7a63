"""What base, adapter and merged model write when asked the same questions, greedily."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTIONS = ("What does shutil.copyfile do?", "What does os.walk do?", "What does textwrap.dedent do?")
_TOKENS = 40
"""Most tokens of one answer; the adapter ends after about twenty."""


@dataclass(frozen=True)
class Sample:
    """One question with its answers."""

    question: str
    base: str
    adapted: str
    """By the base model with the adapter loaded through PEFT."""
    merged: str
    """By the merged model, loaded without PEFT."""


def write_samples(base: Path, adapter: Path, merged: Path) -> list[Sample]:
    """Ask all three the QUESTIONS, each through the chat template its own folder carries; computed in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    from_base = _answers(plain, AutoTokenizer.from_pretrained(base))
    with warnings.catch_warnings():
        # peft 0.21 asks models for a property that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = PeftModel.from_pretrained(plain, str(adapter))
    from_adapter = _answers(adapted, AutoTokenizer.from_pretrained(adapter))
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    from_merged = _answers(whole, AutoTokenizer.from_pretrained(merged))
    return [Sample(*answers) for answers in zip(QUESTIONS, from_base, from_adapter, from_merged, strict=True)]


def _answers(model: Any, tokenizer: Any) -> list[str]:
    answers = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(answer.split()))
    return answers
