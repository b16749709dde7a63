"""Classifiers on decoders whose config names no padding token: Llama's own bases, for one."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from merge_adapter.verify.outputs.answers import answer
from merge_adapter.verify.probes.batch import Batch

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "num_labels": 3,
}  # fmt: skip


def test_documents_are_asked_one_by_one_where_nothing_pads() -> None:
    """transformers refuses a batch then; each document's answer is the one it gets when it stands alone."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=None)).eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = answer(model, "classifier", Batch(ids, mask), torch.device("cpu"))
    with torch.no_grad():
        alone = [model(input_ids=ids[:1]).logits, model(input_ids=ids[1:, :2]).logits]
    torch.testing.assert_close(found, torch.cat(alone))
