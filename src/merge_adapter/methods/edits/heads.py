"""What the config must say after a merge: class, labels, vocabulary, ties."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_adapter.errors import BaseModelError, ShapeError
from merge_adapter.methods.change import Context, Planned
from merge_adapter.methods.edits.placing import Placed, config_without_ties
from merge_adapter.methods.edits.resizing import label_heads, resize_bias, vocabularies
from merge_adapter.methods.task import headed_class, is_labelled

_PER_TOKEN = frozenset(
    {
        "lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "tok_embeddings",
        "token_embedding", "predictions",
    }
)  # fmt: skip
"""Last parts of the paths of modules that have one row per token."""


def head_changes(context: Context, placed: Placed) -> Planned:
    """The plan of an adapter whose changes are placed, with the edits of config.json they call for."""
    base = dict(context.sources.base.config)
    config: dict[str, Any] = config_without_ties(base) if placed.untied else {}
    notes = list(placed.notes)
    dropped: tuple[str, ...] = ()
    resized = _resized(context, placed)
    architecture = _new_architecture(context, placed, resized)
    if architecture is not None:
        config["architectures"] = [architecture]
        _check_complete(context, placed, architecture)
        dropped = context.names.unused
        notes.append(f"The merged model is a {architecture}.")
        if dropped:
            notes.append(
                f"Tensors of the base that {architecture} does not have are left out: {_some(dropped)}."
            )
    config |= _labels(context, notes)
    changes = placed.changes
    if resized is not None:
        _check_resized(resized, dropped)
        config |= _with_vocabulary({**base, **config}, resized.before, resized.after)
        notes.append(
            f"The vocabulary was resized from {resized.before} to {resized.after} tokens in training."
        )
        biases = [name for name in resized.biases if name not in dropped]
        changes = (*changes, *(resize_bias(context.base[name], resized.after) for name in biases))
    return Planned(changes, tuple(notes), config, dropped=dropped)


def _new_architecture(context: Context, placed: Placed, resized: Resized | None) -> str | None:
    """The class of the merged model where it is not the base's own."""
    found = context.names.architecture
    if found is None or found in (context.sources.base.config.get("architectures") or ()):
        return None
    weights = [name for name in placed.added if name.endswith(".weight")]
    # A head of another class, still of the old vocabulary, could not be loaded any more.
    outgrown = resized is not None and set(resized.stale) & set(context.names.unused)
    return found if weights or headed_class(context.config) or outgrown else None


def _check_complete(context: Context, placed: Placed, architecture: str) -> None:
    """Refuse a class with parameters that neither base nor adapter has: loaded, they would be random.

    Raises OneWayError for some that the base has in a form that cannot be written back.
    """
    model = context.names.module("")
    if model is None:
        return
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in placed.added
        and not any(
            context.names.direct(one) or context.names.group(one) for one in (name, *context.names.tied(name))
        )
    ]
    for name in missing:
        context.names.check_two_ways(name)  # on disk all the same, in a form that cannot be written back
    if missing:
        raise BaseModelError(
            f"A {architecture} has parameters that neither the base nor the adapter holds: {_some(missing)}. In"
            " training they were random, and nothing recorded their values.",
            hint="Name the very base of the training, with these parameters, with --base-model.",
        )


def _labels(context: Context, notes: list[str]) -> dict[str, Any]:
    """`id2label` and its like where the adapter's head has another number of labels than the base says."""
    counts = sorted({spec.shape[0] for spec in label_heads(context.tensors).values()})
    if not counts or not is_labelled(context.config):
        return {}
    if len(counts) > 1:
        raise ShapeError(
            f"The heads of the adapter have {counts[0]} labels and {counts[1]} labels.",
            hint="Keep the adapter unmerged; no config.json can say both.",
        )
    count, config = counts[0], context.sources.base.config
    known = config.get("id2label")
    if count == (len(known) if isinstance(known, Mapping) else config.get("num_labels", 2)):
        return {}
    names = [f"LABEL_{number}" for number in range(count)]
    notes.append(
        f"The head has {count} label{'s' if count > 1 else ''}; adapters do not record names for them: {_some(names)}."
    )
    changes: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if "num_labels" in config:
        changes["num_labels"] = count
    return changes


@dataclass(frozen=True)
class Resized:
    """A vocabulary that was resized in training."""

    before: int
    after: int
    stale: tuple[str, ...]
    """Tensors of the output with one row per token that still have the old number."""
    biases: tuple[str, ...]
    """Frozen biases with one column per token, which transformers resizes by rule and PEFT does not save."""


def _resized(context: Context, placed: Placed) -> Resized | None:
    """What the changes say of the vocabulary's size. Raises ShapeError for two sizes at once."""
    sizes = vocabularies(context.sources.base.config)
    written = {spec.name: spec for change in placed.changes for spec in change.writes}
    found = {
        (context.base[name].shape[0], spec.shape[0])
        for name, spec in written.items()
        if name in context.base and context.base[name].shape[:1] != spec.shape[:1]
        if context.base[name].shape[0] in sizes and _per_token(name)
    }
    if not found:
        return None
    (before, after), *others = sorted(found)
    if others:
        raise ShapeError(
            f"The vocabulary was resized from {before} to {after} tokens for one embedding in training, and from"
            f" {others[0][0]} to {others[0][1]} for another.",
            hint="Keep the adapter unmerged; no config.json can say both.",
        )
    specs = {**context.base, **written}
    stale = tuple(name for name, spec in specs.items() if spec.shape[:1] == (before,) and _per_token(name))
    biases = tuple(
        name
        for name, spec in specs.items()
        if name.rpartition(".")[2] == "final_logits_bias" and spec.shape == (1, before)
    )
    return Resized(before, after, stale, biases)


def _check_resized(resized: Resized, dropped: Collection[str]) -> None:
    """Make sure that all of the model follows the vocabulary."""
    stale = [name for name in resized.stale if name not in dropped]
    if stale:
        raise ShapeError(
            f"The vocabulary was resized from {resized.before} to {resized.after} tokens in training, but the"
            f" adapter has no rows of that size for {_some(stale)}.",
            hint="Save the adapter with save_embedding_layers=True, so that all embeddings are in it.",
        )


def _with_vocabulary(merged: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    edits: dict[str, Any] = {}
    if merged.get("vocab_size") == before:
        edits["vocab_size"] = after
    for key, value in merged.items():
        if isinstance(value, Mapping) and value.get("vocab_size") == before:
            edits[key] = {**value, "vocab_size": after}
    return edits


def _per_token(name: str) -> bool:
    parts = name.split(".")
    return (
        parts[-1] in ("weight", "bias")
        and len(parts) > 1
        and (parts[-2] in _PER_TOKEN or parts[-3:-1] == ["predictions", "decoder"])
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
