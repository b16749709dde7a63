"""The demo's language model: a Llama of about one million parameters, and a LoRA that makes it answer.

The base model writes pages in the manner of Python's own documentation. The adapter, trained with PEFT on
questions rendered through its own chat template, answers in one line that begins with "In short:" and stops.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from training import cards, corpus

log = logging.getLogger(__name__)

VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
BASE_STEPS = 700
BASE_RATE = 4e-3
ADAPTER_STEPS = 300
ADAPTER_RATE = 4e-3
RANK = 8
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BEGIN, END = range(3)
"""Ids: the trainer gives special tokens the first ones, in this order."""

BASE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""What the base offers: the turns as they are."""
INSTRUCTION = "Answer in one line."
ADAPTER_TEMPLATE = BASE_TEMPLATE.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|system|>" + INSTRUCTION + "<|end|>' }}{% endif %}",
)
"""What the adapter was trained with: an instruction goes first. A merge that keeps the base's template instead
gives the model prompts it never saw."""


def train_base(folder: Path, *, seed: int) -> None:
    """Train tokenizer and model on the reference documents; write the repository's files into `folder`."""
    torch.manual_seed(seed)
    documents = corpus.reference_documents()
    tokenizer = _tokenizer(documents)
    model = LlamaForCausalLM(_config())
    log.info("%d parameters, %d documents", sum(p.numel() for p in model.parameters()), len(documents))
    stream = _token_stream(tokenizer, documents, seed)
    _fit(model, _blocks(stream, seed), steps=BASE_STEPS, rate=BASE_RATE)
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, max_new_tokens=64, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cards.write_base_card(folder)


def train_adapter(folder: Path, *, base: Path, base_id: str, seed: int) -> None:
    """Train a LoRA on every linear layer of `base` (read in bf16, computed in fp32); write it into `folder`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = ADAPTER_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    _fit(adapted, _conversations(tokenizer, seed), steps=ADAPTER_STEPS, rate=ADAPTER_RATE)
    adapted.peft_config["default"].base_model_name_or_path = base_id
    adapted.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    cards.write_adapter_card(folder, base_id=base_id)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def _tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts the begin token in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=512,
        chat_template=BASE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> torch.Tensor:
    """All documents in a shuffled order as one long row, each between begin and end."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for row in tokenizer(order)["input_ids"]:
        ids += [*row, END]
    log.info("%d tokens", len(ids))
    return torch.tensor(ids)


def _blocks(stream: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), both [BATCH, CONTEXT], cut from the stream at random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
        ids = torch.stack([stream[start : start + CONTEXT] for start in starts])
        yield ids, ids


def _conversations(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), both [2 * BATCH, longest]; only the answers carry labels."""
    examples = []
    for item in corpus.questions():
        asked = [{"role": "user", "content": item.question}]
        answered = [*asked, {"role": "assistant", "content": item.answer}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(answered, return_dict=False)
        examples.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
    log.info("%d questions", len(examples))
    chooser = random.Random(seed)
    while True:
        chosen = chooser.sample(examples, 2 * BATCH)
        longest = max(len(ids) for ids, _ in chosen)
        yield (
            torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in chosen]),
            torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in chosen]),
        )


def _fit(
    model: torch.nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], *, steps: int, rate: float
) -> None:
    """AdamW with a short warm-up and a cosine decay. Right padding needs no mask in a causal model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log.info("step %d of %d, loss %.3f", step, steps, loss.item())
    model.eval()
