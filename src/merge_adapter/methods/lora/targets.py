"""Which parameter the factors of one adapted module belong to."""

from __future__ import annotations

from merge_adapter.errors import AccountingError
from merge_adapter.methods.change import Context

INSIDE = ".base_layer"
"""What PEFT puts into a path for each of its layers around another."""
_OUT_PROJ = ".out_proj"
OUT_PROJ_TIMES = 2
"""PEFT's layer around torch's MultiheadAttention adds the update of its output projection twice, by hand and through
the layer inside, each time it runs as well as when it merges: so it was trained, and so it is merged."""


def parameter_of(context: Context, path: str, embedding: bool) -> str:  # noqa: FBT001 - one of two kinds
    """The parameter that a module's factors change: its weight, unless the config names parameters.

    With `target_parameters` PEFT wraps the module once per parameter, in the order in which the module holds
    them, each wrapper inside the next; `path` has one `.base_layer` for each wrapper outside. Raises
    AccountingError where that leads to no parameter.
    """
    attention = attention_of(context, path)
    if attention is not None:
        return f"{attention}{_OUT_PROJ}.weight" if path.endswith(_OUT_PROJ) else f"{attention}.in_proj_weight"
    module = path.replace(INSIDE, "")
    targeted = () if embedding else named_parameters(context, module)
    if not targeted:
        return f"{module}.weight"
    outside = path.count(INSIDE)
    if outside >= len(targeted):
        raise AccountingError(
            f"{path}: the adapter changes {outside + 1} or more parameters of {module}, its config names "
            f"{len(targeted)}: {', '.join(targeted)}.",
            tensors=(path,),
            hint="adapter_config.json does not belong to these weights.",
        )
    return targeted[len(targeted) - 1 - outside]


def attention_of(context: Context, path: str) -> str | None:
    """The path of torch's MultiheadAttention that a module's factors belong to, by themselves or through its out_proj.

    PEFT adapts both of its weights together, and keeps the factors of the second below `.base_layer`. None for any
    other module, an out_proj that was adapted alone among them.
    """
    outer = path.removesuffix(f"{INSIDE}{_OUT_PROJ}")
    module = context.names.module(outer)
    return (
        outer if hasattr(module, "in_proj_weight") and type(module).__name__ == "MultiheadAttention" else None
    )


def named_parameters(context: Context, module: str) -> tuple[str, ...]:
    """The parameters of a module that the config targets by name, in the module's own order."""
    wanted = context.config.get("target_parameters") or ()
    found = context.names.module(module) if wanted else None
    if found is None:
        return ()
    names = [f"{module}.{name}" for name, _ in found.named_parameters(recurse=False)]
    return tuple(name for name in names if any(name == key or name.endswith(f".{key}") for key in wanted))
