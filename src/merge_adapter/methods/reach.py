"""Which modules the targets of adapter_config.json take in, by PEFT's own rule: their paths tell, no model is needed.

PEFT loads no factors for a module that its targets do not take in. Merged all the same, they would make another model
than base + adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from merge_adapter.errors import AccountingError
from merge_adapter.methods.lora.targets import INSIDE

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer of a model; it saves their names in its place."""


def names_targets(config: Mapping[str, Any]) -> bool:
    """Whether the config says by name what it targets, and does not leave it to the model."""
    targets = config.get("target_modules")
    if targets is None:
        return bool(config.get("target_parameters"))
    return not (isinstance(targets, str) and targets.lower() == ALL_LINEAR)


def reaches(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts a layer on the module of this path, for a config that names its targets."""
    if _is_named(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules") or ()
    # a pattern, and a path that is listed whole, say the layers themselves
    return _is_named(targets, module) and (
        isinstance(targets, str) or module in targets or _is_in_layers(config, module)
    )


def check_reached(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> None:
    """Raise AccountingError for adapted modules that the config does not target.

    `modules`: path, with `.base_layer` where one layer is inside another -> the adapter's tensors. Where paths do not
    tell, because targets are left to the model or ties are followed, nothing is said.
    """
    if not names_targets(config) or config.get("ensure_weight_tying"):
        return
    lost = {path: tensors for path, tensors in modules.items() if not _is_reached(config, path)}
    if lost:
        shown = ", ".join(list(lost)[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise AccountingError(
            f"{len(lost)} of {len(modules)} modules that the adapter's file holds factors of are none that"
            f" adapter_config.json targets: {shown}. PEFT loads the adapter without them.",
            tensors=tuple(name for tensors in lost.values() for name in tensors),
            hint="Restore the config that was saved with these weights: target_modules, exclude_modules,"
            " layers_to_transform and modules_to_save say which modules are adapted. A pattern of paths that"
            " transformers has changed since is to be written anew for those it has now.",
        )


def _is_reached(config: Mapping[str, Any], path: str) -> bool:
    module = path.replace(INSIDE, "")
    # the output projection inside torch's MultiheadAttention is adapted along with it
    return any(reaches(config, one) for one in (module, path.partition(INSIDE)[0])) or _holds_parameter(
        config.get("target_parameters") or (), module
    )


def _holds_parameter(targets: Iterable[str], module: str) -> bool:
    """Whether one of `target_parameters` can be a parameter of this module; a bare name can be of any."""
    modules = (name.rpartition(".")[0] for name in targets)
    return any(not one or module == one or module.endswith(f".{one}") for one in modules)


def _is_named(names: Any, module: str) -> bool:
    """Whether a pattern takes in the whole path, or a list holds the path or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None if names else False
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether the module lies in one of `layers_to_transform`, of which none means all."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    given = config.get("layers_pattern") or []
    patterns = [given] if isinstance(given, str) else given
    places = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    found = (re.match(rf"{place}\.(?P<idx>\d+)\.", module) for place in places)
    match = next(filter(None, found), None)
    return match is not None and int(match["idx"]) in (layers if isinstance(layers, list) else [layers])
