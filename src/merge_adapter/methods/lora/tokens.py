"""Single rows of an embedding trained by themselves: LoRA's `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from merge_adapter.errors import AccountingError, MalformedError, ShapeError
from merge_adapter.methods.change import Context, Kind, TensorSpec
from merge_adapter.methods.edits.placing import Edit, check_shape, shape_of
from merge_adapter.methods.lora.arithmetic import NewRows

_SUFFIX = ".token_adapter.trainable_tokens_delta"


def split_tokens(
    parameters: Mapping[str, TensorSpec],
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Trained tokens by the path of their module, and the tensors that are something else by their path."""
    deltas: dict[str, TensorSpec] = {}
    rest: dict[str, TensorSpec] = {}
    for path, spec in parameters.items():
        if path.endswith(_SUFFIX):
            deltas[path.removesuffix(_SUFFIX)] = spec
        else:
            rest[path] = spec
    return deltas, rest


def token_edits(
    context: Context, deltas: Mapping[str, TensorSpec], replaced: Mapping[str, tuple[int, ...]]
) -> list[Edit]:
    """The edits of trained tokens. `replaced`: parameter -> shape of the adapter's tensor that it becomes first."""
    edits = [
        _edit(context, module, spec, replaced.get(f"{module}.weight")) for module, spec in deltas.items()
    ]
    return [*edits, *_declared(context, edits)]


def _declared(context: Context, edits: Sequence[Edit]) -> Iterator[Edit]:
    """The same rows of parameters that only config.json ties to a trained one: PEFT sets them too."""
    done = {edit.parameter for edit in edits}
    for edit in edits:
        tied = {edit.parameter, *context.names.tied(edit.parameter)}
        for other in context.names.declared_ties(edit.parameter):
            if not done & {other, *context.names.tied(other)} and other not in tied:
                done.add(other)
                yield replace(edit, parameter=other, counted=False)


def _edit(context: Context, module: str, spec: TensorSpec, resized: tuple[int, ...] | None) -> Edit:
    rows = _indices(context, module, spec)
    parameter = f"{module}.weight"
    shape = resized or shape_of(context, parameter)
    if shape is not None:
        check_shape(spec.name, (len(rows), *shape[1:]), spec.shape)
        beyond = [row for row in rows if not 0 <= row < shape[0]]
        if beyond:
            raise ShapeError(
                f"{parameter}: the adapter trained the tokens {beyond}, the base's vocabulary has {shape[0]}.",
                hint="The vocabulary was grown for training; save the adapter with save_embedding_layers=True.",
            )
    return Edit(parameter, (spec.name,), Kind.REPLACE, NewRows(spec.name, rows), follows_ties=True)


def _indices(context: Context, module: str, spec: TensorSpec) -> tuple[int, ...]:
    """Token ids in the order of the rows of `spec`."""
    given = context.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = _given_for(given, (module, *_tied_modules(context, module)))
    if given is None:
        raise AccountingError(
            f"{spec.name} holds trained tokens, but adapter_config.json names none for {module}.",
            tensors=(spec.name,),
            hint="Restore trainable_token_indices in adapter_config.json.",
        )
    if not isinstance(given, list) or not all(type(row) is int for row in given):
        raise MalformedError(
            f"adapter_config.json: expected trainable_token_indices to list token ids, got {given!r:.200}.",
            hint="Save the adapter again.",
        )
    if len(given) != len(set(given)) or (spec.shape and len(given) != spec.shape[0]):
        raise ShapeError(
            f"{spec.name}: expected one row for each of {len(given)} different tokens, got {list(spec.shape)}.",
            hint="adapter_config.json does not belong to these weights.",
        )
    return tuple(given)


def _given_for(indices: Mapping[str, object], modules: Iterable[str]) -> object:
    """What is said of the first of `modules` that is named; None for none."""
    for module in modules:
        for name, given in indices.items():
            if module == name or module.endswith(f".{name}"):
                return given
    return None


def _tied_modules(context: Context, module: str) -> Iterator[str]:
    """Modules whose weight is tied to that of `module`: PEFT trains the same tokens of them, named or not."""
    weight = f"{module}.weight"
    for other in (*context.names.tied(weight), *context.names.declared_ties(weight)):
        yield other.removesuffix(".weight")
