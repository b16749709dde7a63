"""What a model answers to a batch of probes, the same code in every arm.

One batch shape, one attention implementation, fp32: arms then differ by their weights alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.probes.batch import Batch

LANGUAGE = ("causal-lm", "masked-lm", "seq2seq-lm", "image-text-to-text", "speech-seq2seq", "speech-ctc")
"""Kinds that answer with a distribution over a vocabulary at each position."""

CLASSES = ("classifier", "image-classifier", "audio-classifier")
"""Kinds that answer with one row of logits for a document."""

TAUGHT = ("seq2seq-lm", "speech-seq2seq")
"""Kinds with a decoder of their own, which is taught the document as the answer."""

MEDIA_ALONE = ("image-classifier", "audio-classifier", "speech-ctc")
"""Kinds that take no token ids; the mask then only counts their positions."""


def answer(
    model: Any,
    kind: str,
    batch: Batch,
    device: torch.device,
    tail: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """What `model` says to one piece, fp32, on the CPU.

    Language models and token classifiers: (documents, length, classes) logits. Classifiers: (documents, classes).
    Question answering: (documents, length, 2). Embedding models: (documents, width), through `tail` or mean-pooled
    and of norm 1. Other classes: (documents, numbers), all that they give.

    Encoder-decoders read the document (or its sound) and are taught its text as the answer: at each place the decoder
    has seen the tokens before it.
    """
    if kind == "classifier" and len(batch) > 1 and not _pads(model):
        rows = (_unpadded(batch, row) for row in range(len(batch)))
        return torch.cat([answer(model, kind, one, device, tail) for one in rows])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some classes draw what they hide from themselves
        output = _asked(model, batch)(**_arguments(model, kind, batch, device))
    if kind == "other":
        return _everything(output, len(batch))
    if kind == "question-answering":
        return torch.stack((output.start_logits, output.end_logits), -1).float().cpu()
    if kind == "embedding":
        if tail is not None:
            return tail(output.last_hidden_state.float().cpu(), batch.mask).float()
        return _pooled(output, batch.mask)
    return _logits(output).float().cpu()


def _pads(model: Any) -> bool:
    """Whether the config names a padding token. Decoders with a class head need it to find a document's last token:
    without one they take single documents only, as they are, and so do the users of base and adapter.
    """
    return isinstance(getattr(model.config, "pad_token_id", None), int)


def _unpadded(batch: Batch, row: int) -> Batch:
    """One document, its real tokens alone."""
    real = batch.mask[row].bool()
    if not real.any():
        return batch.part(row, row + 1)
    media = {name: value[row : row + 1] for name, value in batch.media.items()}
    return Batch(batch.ids[row : row + 1, real], batch.mask[row : row + 1, real], media)


def _asked(model: Any, batch: Batch) -> Any:
    """PEFT's models of a task name the arguments they take, text alone: media go to the adapted model itself."""
    return model.get_base_model() if batch.media and hasattr(model, "get_base_model") else model


def _arguments(model: Any, kind: str, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    inputs = batch.arguments(device)
    if kind not in (*MEDIA_ALONE, "speech-seq2seq") and batch.ids.shape[1]:
        inputs |= {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
    if kind in TAUGHT:
        inputs["decoder_input_ids"] = shifted(model.config, batch.ids).to(device)
        inputs["decoder_attention_mask"] = shifted_mask(batch.mask).to(device)
    elif kind in ("embedding", "other") and _has_decoder(model) and batch.ids.shape[1]:
        inputs["decoder_input_ids"] = shifted(model.config, batch.ids).to(device)
    return inputs


def _has_decoder(model: Any) -> bool:
    """Whether an encoder-decoder is there whole: the encoder alone may have the same config."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(whole.config, "is_encoder_decoder", False)) and hasattr(whole, "decoder")


def start_token(config: Any) -> int:
    """What a decoder of its own is given before the first token of its answer."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0


def shifted(config: Any, ids: Tensor) -> Tensor:
    """(documents, length): the start token, then all of `ids` but the last."""
    return torch.cat((torch.full_like(ids[:, :1], start_token(config)), ids[:, :-1]), 1)


def shifted_mask(mask: Tensor) -> Tensor:
    """The mask that goes with `shifted`."""
    return torch.cat((torch.ones_like(mask[:, :1]), mask[:, :-1]), 1)


def _logits(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(logits, Tensor)
    return logits


def _everything(output: Any, documents: int) -> Tensor:
    """Every floating-point tensor with an entry for each document, side by side."""
    found = [
        value.float().cpu().reshape(documents, -1)
        for value in output.to_tuple()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim
        and value.shape[0] == documents
    ]
    if not found:
        raise ValueError("it gives no numbers for single documents")
    return torch.cat(found, 1)


def _pooled(output: Any, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state.float().cpu()  # (documents, length, width)
    if hidden.ndim == 4:  # convolutions: (documents, width, height, width of the picture)
        hidden = hidden.flatten(2).transpose(1, 2)
    if mask.shape != hidden.shape[:2]:  # patches and frames: all of them are real
        mask = torch.ones(hidden.shape[:2], dtype=mask.dtype)
    weights = mask[..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def greedy(
    model: Any,
    batch: Batch,
    length: int,
    device: torch.device,
    kind: str = "causal-lm",
    begun: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy continuations of prompts: ids (documents, length), and the logit gap of first to second.

    `begun` (documents, any): what the model has said already; the continuation is of that.

    Prompts of a decoder are padded on the left, those of an encoder on the right. Plain argmax over a growing cache,
    so that no sampling setting of a generation config plays a part.
    """
    said = begun if begun is not None else batch.ids[:, :0]
    with torch.no_grad():
        asked = _answered if kind in TAUGHT else _continued
        steps = asked(model, batch, said, device)
        chosen: list[Tensor] = []
        gaps: list[Tensor] = []
        logits = next(steps)
        while True:
            top = logits[:, -1].float().topk(2, dim=-1)
            chosen.append(top.indices[:, 0].cpu())
            gaps.append((top.values[:, 0] - top.values[:, 1]).cpu())
            if len(chosen) == length:
                return torch.stack(chosen, 1), torch.stack(gaps, 1)
            logits = steps.send(top.indices[:, :1])


def continued(
    model: Any, prompts: Batch, text: Tensor, choices: Tensor, device: torch.device, kind: str = "causal-lm"
) -> Tensor:
    """What the model itself writes, (documents, length), given another's `text` and its own `choices` at each place.

    The two are one until they first differ; only from there on is it asked to write.
    """
    differs = choices != text
    rows = differs.any(1).nonzero().flatten()
    if not len(rows):
        return text.clone()
    same = int(differs[rows].int().argmax(1).min())
    written = text.clone()
    media = {name: value[rows] for name, value in prompts.media.items()}
    chosen = Batch(prompts.ids[rows], prompts.mask[rows], media)
    rest, _ = greedy(model, chosen, text.shape[1] - same, device, kind, text[rows, :same])
    written[rows, same:] = rest
    return written


def _continued(
    model: Any, batch: Batch, said: Tensor, device: torch.device
) -> Generator[Tensor, Tensor, None]:
    """Logits of a decoder that gets the tokens chosen from them sent back, (documents, 1) each."""
    ids = torch.cat((batch.ids, said), 1).to(device)
    mask = torch.cat((batch.mask, torch.ones_like(said)), 1).to(device)
    step, past = ids, None
    while True:
        inputs: dict[str, Any] = {"input_ids": step, "attention_mask": mask, "use_cache": True}
        inputs |= _places(model, mask, step.shape[1])
        if past is not None:
            inputs["past_key_values"] = past
        output = model(**inputs)
        past = getattr(output, "past_key_values", None)
        token = yield _logits(output)
        ids = torch.cat((ids, token), 1)
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        step = token if past is not None else ids


def _answered(
    model: Any, batch: Batch, said: Tensor, device: torch.device
) -> Generator[Tensor, Tensor, None]:
    """The same of a decoder that answers what an encoder has read."""
    model = _asked(model, batch)
    step = torch.full((len(batch), 1), start_token(model.config), device=device)
    step = torch.cat((step, said.to(device)), 1)
    inputs: dict[str, Any] = _encoded(batch, device)
    kept = {name: value for name, value in inputs.items() if name == "attention_mask"}
    past = None
    while True:
        output = model(**inputs, decoder_input_ids=step, use_cache=True)
        past = getattr(output, "past_key_values", None)
        token = yield _logits(output)
        step = token if past is not None else torch.cat((step, token), 1)
        inputs = {**kept, "encoder_outputs": (output.encoder_last_hidden_state,)}
        if past is not None:
            inputs["past_key_values"] = past


def _encoded(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What the encoder reads: sounds where there are some, which need no mask, else text."""
    if batch.media:
        return batch.arguments(device)
    return {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}


def _places(model: Any, mask: Tensor, count: int) -> dict[str, Tensor]:
    """Positions of the last `count` tokens that leave padding on the left out, for models that are told them."""
    if bool(mask.all()):
        return {}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]}


def taught(
    model: Any, prompts: Batch, continuation: Tensor, device: torch.device, kind: str = "causal-lm"
) -> Tensor:
    """The model's own next-token choice at every place of a given continuation: (documents, length)."""
    with torch.no_grad():
        if kind in TAUGHT:
            model = _asked(model, prompts)
            inputs = _encoded(prompts, device)
            output = model(**inputs, decoder_input_ids=shifted(model.config, continuation).to(device))
            return _logits(output).float().argmax(-1).cpu()
        ids = torch.cat((prompts.ids, continuation), 1).to(device)
        mask = torch.cat((prompts.mask, torch.ones_like(continuation)), 1).to(device)
        output = model(input_ids=ids, attention_mask=mask, **_places(model, mask, ids.shape[1]))
    start = prompts.ids.shape[1] - 1
    return _logits(output)[:, start:-1].float().argmax(-1).cpu()
