"""Several adapters in PEFT's own hands: each times its weight, or made one by its `add_weighted_adapter`.

The reference for a merge of several adapters. Nothing of the merge's arithmetic is used: PEFT loads the adapters, and
PEFT combines them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from merge_adapter.types import Combination, CombinationType, Resolved

COMBINED = "combined"
"""The name under which PEFT holds the combined adapter."""


def activate(model: Any, names: tuple[str, ...], sources: Resolved) -> None:
    """Make PEFT's `model` answer with its adapters `names`, each with its weight, combined as `sources` says.

    Raises what PEFT raises for adapters that it cannot combine.
    """
    if sources.combination.type is not CombinationType.SEQUENTIAL:
        _combine(model, names, sources)
        return
    if len(names) > 1:
        model.base_model.set_adapter(list(names))
    if any(adapter.weight != 1 for adapter in sources.adapters):
        _weigh(model, names, sources)


def _weigh(model: Any, names: tuple[str, ...], sources: Resolved) -> None:
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name, adapter in zip(names, sources.adapters, strict=True):
                if name in scaling:
                    scaling[name] *= adapter.weight


def _combine(model: Any, names: tuple[str, ...], sources: Resolved) -> None:
    """PEFT's weighted adapter alone is active afterwards.

    Types that end in an SVD are computed in float64: pruning compares values, and an SVD in float32 errs by more than
    a merge may. The combined adapter's scale is 1 by PEFT's own account (`lora_alpha` is set to the rank), which its
    formula for rsLoRA overlooks; here it is set.
    """
    tuner = model.base_model
    combination = sources.combination
    if all(adapter.method == "IA3" for adapter in sources.adapters):
        _combine_vectors(model, names, [adapter.weight for adapter in sources.adapters])
        return
    _spell_out(tuner, names)
    if combination.type.endswith("svd"):
        for part, parameter in tuner.model.named_parameters():
            if ".lora_" in part:
                parameter.data = parameter.data.double()
    _seed_by_module(tuner, combination)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
        tuner.add_weighted_adapter(
            list(names),
            [adapter.weight for adapter in sources.adapters],
            COMBINED,
            combination_type=combination.type.value,
            svd_rank=combination.svd_rank,
            svd_full_matrices=False,
            density=combination.density,
            majority_sign_method=combination.majority_sign.value,
        )
    model.set_adapter(COMBINED)
    for module in tuner.model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and COMBINED in scaling:
            scaling[COMBINED] = 1.0
    for name in names:
        model.delete_adapter(name)


def _combine_vectors(model: Any, names: tuple[str, ...], weights: list[float]) -> None:
    """IA3: PEFT's weighted adapter, its vectors summed once more in float32, where PEFT has the dtype of the base."""
    model.base_model.add_weighted_adapter(list(names), weights, COMBINED)
    model.set_adapter(COMBINED)
    for module in model.base_model.model.modules():
        vectors = getattr(module, "ia3_l", {})
        if COMBINED in vectors:
            held = [
                vectors[name].data.float() * weight
                for name, weight in zip(names, weights, strict=True)
                if name in vectors
            ]
            vectors[COMBINED].data = torch.stack(held).sum(0)
    for name in names:
        model.delete_adapter(name)


def _spell_out(tuner: Any, names: tuple[str, ...]) -> None:
    """Name each adapter's targets by their full paths.

    PEFT gives the combined adapter the first one's other settings, `layers_to_transform` among them, and would leave
    out what only the others target.
    """
    for name in names:
        config = tuner.peft_config[name]
        config.target_modules = {
            path
            for path, module in tuner.model.named_modules()
            if name in getattr(module, "lora_A", ()) or name in getattr(module, "lora_embedding_A", ())
        }
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def _seed_by_module(tuner: Any, combination: Combination) -> None:
    """Let PEFT draw for each module from the seed that is its own, whatever order it walks them in."""
    paths = {id(module): path for path, module in tuner.model.named_modules()}
    at = {
        "_generalized_task_arithmetic_weighted_adapter": 3,
        "_svd_generalized_task_arithmetic_weighted_adapter": 4,
    }
    for method, place in at.items():
        theirs = getattr(tuner, method)

        def seeded(*args: Any, _theirs: Any = theirs, _place: int = place, **kwargs: Any) -> Any:
            target = args[_place]
            torch.default_generator.manual_seed(combination.seed_of(paths[id(target)]))
            return _theirs(*args, **kwargs)

        setattr(tuner, method, seeded)
