"""Prompt tuning and P-tuning on a causal language model, folded in as tokens of the vocabulary.

The learned embeddings become rows of the input embeddings, the rows of tokens that the tokenizer puts in front of
every input. The model then reads what PEFT would have let it read.

Those tokens must never be written. Each gets the mean of all output rows: its logit is the mean of all logits, hence
below the largest of them whatever the model has read, and by Jensen's inequality its probability is at most
1 / vocabulary of what the others have together. That holds for any input and needs no bias, which most heads lack.
On top of it the generation config suppresses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.output import target_spec
from merge_adapter.errors import AccountingError, MethodError, ShapeError
from merge_adapter.methods.adapter_file import PROMPT
from merge_adapter.methods.change import (
    FLOATING,
    Context,
    Kind,
    ModuleArithmetic,
    ModuleChange,
    NameMap,
    Planned,
    TensorSpec,
    Weights,
)
from merge_adapter.methods.edits.placing import config_without_ties
from merge_adapter.methods.edits.tying import check_can_part
from merge_adapter.types import Repository, Resolved

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER = "tokenizer.json"
_LIMIT = 64 << 20
"""Bytes of a tokenizer.json read at most."""
_ROWS = 4096
"""Rows averaged at a time."""
_KEEP = "Keep the adapter and load it with PEFT beside its base."


@dataclass(frozen=True)
class VirtualTokens:
    """The tokens that a soft prompt becomes."""

    ids: tuple[int, ...]
    """The first ids that the tokenizer has not given away."""
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of them, as they stand in front of a text."""
        return "".join(self.names)


def virtual_tokens(sources: Resolved) -> VirtualTokens:
    """Ids and names for the adapter's virtual tokens. Raises MethodError where there is no tokenizer to hold them."""
    repository = sources.tokenizer
    if repository is None or TOKENIZER not in repository.files:
        raise MethodError(
            f"A soft prompt becomes tokens of the tokenizer, and neither adapter nor base has a {TOKENIZER}.",
            hint=_KEEP,
        )
    taken = _ids(repository)
    first = max(taken.values()) + 1
    count = sources.adapter.config.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise MethodError(f"adapter_config.json states {count!r} virtual tokens.", hint=_KEEP)
    names = tuple(f"<|soft_prompt_{number}|>" for number in range(count))
    clash = next((name for name in names if name in taken), None)
    if clash is not None:
        raise MethodError(
            f"The tokenizer of {repository.origin} already has a token {clash}: a soft prompt was folded in before.",
            hint=_KEEP,
        )
    return VirtualTokens(tuple(range(first, first + count)), names)


def plan_soft_prompt(context: Context) -> Planned:
    """Plan a soft prompt. Raises MethodError, AccountingError or ShapeError."""
    _check_use(context)
    prompt = _check_tensors(context)
    tokens = virtual_tokens(context.sources)
    table, head, scale = _places(getattr(context.names, "model", None), tokens.ids[0])
    stored = _stored(context, f"{table}.weight")
    if prompt.shape != (len(tokens.ids), stored.shape[1]):
        raise ShapeError(
            f"{prompt.name}: expected {[len(tokens.ids), stored.shape[1]]}, got {list(prompt.shape)}.",
            hint="The adapter was trained on another base; name that one with --base-model.",
        )
    if tokens.ids[0] > stored.shape[0]:
        raise MethodError(
            f"The tokenizer knows {tokens.ids[0]} tokens, the base has embeddings for {stored.shape[0]}.",
            hint=_KEEP,
        )
    tied = bool(context.names.tied(f"{table}.weight"))
    if tied:
        check_can_part(context, (f"{table}.weight", f"{head}.weight"))
    rows = max(stored.shape[0], tokens.ids[-1] + 1)
    arithmetic = NewRows(stored.name, stored.name, rows, tokens.ids, "", prompt.name, scale)
    changes = [_grow(context, stored, f"{table}.weight", arithmetic)]
    for leaf in ("weight", "bias"):
        parameter = f"{head}.{leaf}"
        if leaf == "bias" and context.names.direct(parameter) is None:
            continue
        source = stored if tied and leaf == "weight" else _stored(context, parameter)
        if source.shape[0] != stored.shape[0]:
            raise MethodError(
                f"{parameter} has {source.shape[0]} rows, {table}.weight has {stored.shape[0]}: tokens that one knows"
                " and the other does not cannot be told apart from new ones.",
                hint=_KEEP,
            )
        name = context.names.disk_name(parameter) if tied and leaf == "weight" else source.name
        changes.append(
            _grow(context, source, parameter, NewRows(source.name, name, rows, tokens.ids, "", None))
        )
    config = config_without_ties(context.sources.base.config) if tied else {}
    if rows != stored.shape[0]:
        config |= _vocabulary(context.sources.base.config, stored.shape[0], rows, config)
    return Planned(tuple(changes), notes=_notes(tokens, tied=tied), config_changes=config)


def _check_use(context: Context) -> None:
    task = context.config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise MethodError(
            f"This soft prompt was trained for {task}; only a causal language model reads its input as one row of"
            " tokens, in front of which a prompt can stand.",
            hint=_KEEP,
        )
    if len(context.sources.adapters) > 1:
        raise MethodError(
            "A soft prompt cannot be merged together with other adapters: each was trained without the others.",
            hint="Merge the others first, then fold the prompt into that model.",
        )
    if context.adapter.weight != 1:
        raise MethodError(
            "A soft prompt has no weight: its tokens stand in front or they do not.", hint=_KEEP
        )


def _check_tensors(context: Context) -> TensorSpec:
    others = tuple(name for name in context.tensors if name != PROMPT)
    if PROMPT not in context.tensors or others:
        raise AccountingError(
            f"A soft prompt is one tensor, prompt_embeddings; this adapter holds {', '.join(context.tensors)}.",
            tensors=others or tuple(context.tensors),
            hint="What was trained beside the prompt cannot be folded in with it.",
        )
    return context.tensors[PROMPT]


def _places(model: Any, tokens: int) -> tuple[str, str, float]:
    """Paths of the input embeddings and of the head, and what the former multiplies its rows with.

    `tokens` is the number of tokens known before. Raises MethodError for a model that reads or writes tokens in
    another way.
    """
    from torch import nn

    table = model.get_input_embeddings() if model is not None else None
    head = model.get_output_embeddings() if model is not None else None
    scale = _scale(table)
    if scale is None or type(head) is not nn.Linear:
        raise MethodError(
            f"{type(model).__name__} reads tokens through {type(table).__name__} and writes them through"
            f" {type(head).__name__}; a prompt can become rows of a plain embedding with a plain linear head alone.",
            hint=_KEEP,
        )
    paths = {id(module): path for path, module in model.named_modules()}
    second = next(
        (
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding) and module is not table and module.num_embeddings > tokens / 2
        ),
        None,
    )
    if second is not None:
        raise MethodError(
            f"{type(model).__name__} reads token ids a second time, through {second}, of which a prompt knows nothing.",
            hint=_KEEP,
        )
    return paths[id(table)], paths[id(head)], scale


def _scale(table: Any) -> float | None:
    """What an embedding multiplies its rows with, as Gemma's does; None for one that does other things.

    PEFT puts the prompt behind that product.
    """
    from torch import nn

    if type(table) is nn.Embedding:
        return 1.0
    if not isinstance(table, nn.Embedding) or not type(table).__name__.endswith("ScaledWordEmbedding"):
        return None
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    return float(scale) if isinstance(scale, int | float) and scale else None


def _stored(context: Context, parameter: str) -> TensorSpec:
    names: NameMap = context.names
    name = names.direct(parameter)
    spec = context.base.get(name) if name is not None else None
    if spec is None or spec.dtype not in FLOATING:
        raise MethodError(f"The base does not hold {parameter} as one tensor of plain numbers.", hint=_KEEP)
    return spec


def _grow(context: Context, source: TensorSpec, parameter: str, arithmetic: NewRows) -> ModuleChange:
    written = TensorSpec(arithmetic.name, source.dtype, (arithmetic.rows, *source.shape[1:]))
    out = target_spec(written, context.settings.dtype)
    return ModuleChange(
        module=parameter,
        reads=(source.name,),
        writes=(written,),
        consumes=(arithmetic.prompt,) if arithmetic.prompt else (),
        kind=Kind.ADD,
        memory_bytes=2 * out.nbytes,
        arithmetic=replace(arithmetic, dtype=out.dtype),
    )


@dataclass(frozen=True)
class NewRows(ModuleArithmetic):
    """A table of the base with some rows new: the prompt's, or the mean of the rows of all other tokens."""

    source: str
    name: str
    rows: int
    """Of the result; those between the base's and the new ones do not occur."""
    ids: tuple[int, ...] = field(repr=False)
    dtype: str
    """Of the output; the plan fills it in."""
    prompt: str | None
    scale: float = 1.0
    """What the embedding multiplies its rows with."""

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:
        import torch

        from merge_adapter.checkpoint.dtypes import torch_dtype

        spec = base.specs[self.source]
        table = torch.zeros(self.rows, *spec.shape[1:], dtype=torch_dtype(self.dtype))
        total = torch.zeros(spec.shape[1:], dtype=torch.float64)
        first = self.ids[0]
        for start in range(0, spec.shape[0], _ROWS):
            block = base.read_rows(self.source, start, min(start + _ROWS, spec.shape[0]))
            table[start : start + len(block)] = block
            total += block[: max(0, first - start)].double().sum(0)
        # a model in 16 bit rounds its factor too
        scale = torch.tensor(self.scale, dtype=table.dtype).item()
        new = adapter.read(self.prompt).double() / scale if self.prompt else total / first
        table[first : self.ids[-1] + 1] = new
        yield self.name, table


def _vocabulary(
    config: Mapping[str, Any], before: int, rows: int, edited: Mapping[str, Any]
) -> dict[str, Any]:
    """`vocab_size` wherever config.json states it as the base's number of rows."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == before:
            changes[key] = rows
        elif isinstance(value, Mapping) and value.get("vocab_size") == before:
            changes[key] = {**edited.get(key, value), "vocab_size": rows}
    if not changes:
        raise MethodError(
            f"config.json does not state a vocab_size of {before}, so it cannot be changed.", hint=_KEEP
        )
    return changes


def _notes(tokens: VirtualTokens, *, tied: bool) -> tuple[str, ...]:
    count = len(tokens.ids)
    notes = [
        f"The soft prompt became the {count} tokens {tokens.names[0]} to {tokens.names[-1]}. The tokenizer and the chat"
        f" template put them in front of every input; ids fed to the model by hand need them too. They take {count} of"
        " the model's positions.",
        "The tokens of the soft prompt are suppressed by generation_config.json, and their logits are the mean of all:"
        " never the largest.",
    ]
    if tied:
        notes.append("Input embeddings and head were tied in the base and are no longer.")
    return tuple(notes)


def _ids(repository: Repository) -> Mapping[str, int]:
    """Token -> id of a tokenizer.json. Raises MethodError for one without a vocabulary."""
    size = repository.files[TOKENIZER]
    try:
        parsed = json.loads(repository.read(TOKENIZER)) if size <= _LIMIT else {}
        pieces = parsed["model"]["vocab"]
        found = (
            dict(pieces) if isinstance(pieces, dict) else {piece[0]: at for at, piece in enumerate(pieces)}
        )
        found |= {token["content"]: token["id"] for token in parsed.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise MethodError(f"{TOKENIZER} of {repository.origin} has no vocabulary.", hint=_KEEP) from error
    if not found or not all(isinstance(number, int) for number in found.values()):
        raise MethodError(f"{TOKENIZER} of {repository.origin} has no vocabulary.", hint=_KEEP)
    return found
