"""Which planner an adapter goes to, and what it is given to look names up with."""

from __future__ import annotations

from collections.abc import Mapping

from merge_adapter.errors import BaseModelError, UnknownModulesError
from merge_adapter.methods.change import Context, NameMap, Planned, TensorSpec
from merge_adapter.methods.patterns import check_patterns, module_paths
from merge_adapter.methods.promised import check_factors, check_promised
from merge_adapter.methods.reach import check_reached, names_targets
from merge_adapter.methods.refuse import SOFT_PROMPTS, check_method
from merge_adapter.methods.table import Method, Way
from merge_adapter.names.choose import PEFT_PREFIX, NoNames, general_names, name_map, split_targets
from merge_adapter.types import Adapter, MergeSettings, Resolved, Strategy

_LAYER_ONLY = ("kasa_config", "use_bdlora")
"""LoRA config keys that closed forms do not cover; PEFT's own layer does."""


def plan_adapter(
    sources: Resolved,
    settings: MergeSettings,
    adapter: Adapter,
    tensors: Mapping[str, TensorSpec],
    base: Mapping[str, TensorSpec],
) -> Planned:
    """Plan one adapter. `tensors` are its own, under repaired names; `base` those of the base checkpoint.

    Raises MethodError for what has no merge, before anything heavy is imported, and what planners raise.
    """
    method = check_method(adapter.config, soft_prompt=settings.soft_prompt)
    if method.peft_type in SOFT_PROMPTS:
        from merge_adapter.methods.soft_prompt import plan_soft_prompt

        names = _general(sources, settings, adapter, tensors, base, method)
        return plan_soft_prompt(_context(sources, settings, adapter, tensors, base, names))
    in_memory = settings.strategy is Strategy.MEMORY
    by_layer = any(adapter.config.get(key) for key in _LAYER_ONLY) or not names_targets(adapter.config)
    if method.way is Way.ROWS and not in_memory and not by_layer:
        names = name_map(
            sources.base,
            adapter.config,
            tensors,
            base,
            tuner_prefixes=method.prefixes,
            trust_remote_code=settings.trust_remote_code,
        )
        context = _context(sources, settings, adapter, tensors, base, names)
        in_rows = _in_rows(context)
    else:
        names = _general(sources, settings, adapter, tensors, base, method)
        context = _context(sources, settings, adapter, tensors, base, names)
        in_rows = False
    if in_rows:
        from merge_adapter.methods.lora.planner import plan_lora, sort_tensors

        planned = plan_lora(context)
        factors = {one.module: one.names for one in sort_tensors(tensors).factors}
        check_reached(adapter.config, factors)
        check_factors(context, factors, lambda: _general(sources, settings, adapter, tensors, base, method))
    else:
        from merge_adapter.methods.peft_layers.planner import plan_peft  # imports torch and PEFT

        planned = plan_peft(context, in_memory=in_memory)
    check_promised(context, split_targets(tensors, method.prefixes)[1])
    return planned


def _in_rows(context: Context) -> bool:
    """Whether every module that a LoRA changes has a weight in the base.

    Experts that transformers 4 had as modules of their own do not; PEFT carries such adapters over.
    """
    modules, _ = split_targets(context.tensors, ("lora_",))
    weights = [f"{module}.weight" for module in modules if ".experts." in module]
    return all(context.names.direct(name) or context.names.group(name) for name in weights)


def _general(
    sources: Resolved,
    settings: MergeSettings,
    adapter: Adapter,
    tensors: Mapping[str, TensorSpec],
    base: Mapping[str, TensorSpec],
    method: Method,
) -> NameMap | NoNames:
    modules, _ = split_targets(tensors, method.prefixes)
    return general_names(
        sources.base,
        adapter.config,
        tensors,
        base,
        modules=modules,
        trust_remote_code=settings.trust_remote_code,
    )


def _context(
    sources: Resolved,
    settings: MergeSettings,
    adapter: Adapter,
    tensors: Mapping[str, TensorSpec],
    base: Mapping[str, TensorSpec],
    names: NameMap | NoNames,
) -> Context:
    if isinstance(names, NoNames):
        homeless = tuple(name for name in tensors if _inside(name, names.absent))
        if homeless:
            raise UnknownModulesError(
                f"{len(homeless)} of {len(tensors)} adapter tensors belong to modules that the base does not have:"
                f" {_some(homeless)}. {names.reason}.",
                tensors=homeless,
                hint="Name the base the adapter was trained on with --base-model.",
            )
        raise BaseModelError(
            f"The base's tensors cannot be matched to the adapter: {names.reason}.",
            hint="Name the base the adapter was trained on with --base-model.",
        )
    check_patterns(adapter.config, module_paths(names, (name.removeprefix(PEFT_PREFIX) for name in tensors)))
    return Context(sources, settings, adapter, adapter.config, tensors, base, names)


def _some(names: tuple[str, ...], most: int = 6) -> str:
    """The first names; the error itself holds all."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _inside(tensor: str, modules: tuple[str, ...]) -> bool:
    path = tensor.removeprefix(PEFT_PREFIX)
    return any(path.startswith(f"{module}.") for module in modules)
