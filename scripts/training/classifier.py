"""A sequence classifier: LoRA and a trained head on the demo's base model, which has no such head."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training import cards, corpus

log = logging.getLogger(__name__)

STEPS = 120
BATCH = 16
RATE = 2e-3
HELD_OUT = 200


def train(folder: Path, *, base: Path, base_id: str, seed: int) -> None:
    """Train code against prose on top of `base`; write the adapter with its head into `folder`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["score"],
    )
    adapted = get_peft_model(model, lora)
    passages = corpus.passages(STEPS * BATCH + HELD_OUT, seed=seed)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        batch = passages[HELD_OUT + step * BATCH : HELD_OUT + (step + 1) * BATCH]
        loss = torch.nn.functional.cross_entropy(
            _logits(adapted, tokenizer, batch), torch.tensor([int(item.is_code) for item in batch])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0 or step == STEPS - 1:
            log.info("step %d of %d, loss %.3f", step, STEPS, loss.item())
    accuracy = _accuracy(adapted, tokenizer, passages[:HELD_OUT])
    log.info("held-out accuracy %.3f", accuracy)
    adapted.peft_config["default"].base_model_name_or_path = base_id
    adapted.save_pretrained(folder, save_embedding_layers=False)
    cards.write_classifier_card(folder, base_id=base_id, accuracy=accuracy)


def _logits(model: PeftModel, tokenizer: object, batch: list[corpus.Passage]) -> torch.Tensor:
    """[len(batch), 2]"""
    inputs = tokenizer(  # type: ignore[operator]
        [item.text for item in batch], padding=True, truncation=True, max_length=160, return_tensors="pt"
    )
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@torch.no_grad()
def _accuracy(model: PeftModel, tokenizer: object, held_out: list[corpus.Passage]) -> float:
    model.eval()
    right = 0
    for at in range(0, len(held_out), BATCH):
        batch = held_out[at : at + BATCH]
        guesses = _logits(model, tokenizer, batch).argmax(-1).tolist()
        right += sum(guess == int(item.is_code) for guess, item in zip(guesses, batch, strict=True))
    return right / len(held_out)
