"""What adapter_config.json says was trained, and the adapter's file lacks: PEFT would not load such an adapter.

One factor that is missing shows where the two are paired. Without anything else the base's own would be kept, where
PEFT warns, and has what it starts a training with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from merge_adapter.errors import AccountingError
from merge_adapter.methods.change import Context, NameMap
from merge_adapter.methods.edits.replacements import is_saved
from merge_adapter.methods.lora.targets import INSIDE
from merge_adapter.methods.lora.tokens import split_tokens
from merge_adapter.methods.reach import reaches
from merge_adapter.names.choose import NoNames


def check_promised(context: Context, parameters: Collection[str]) -> None:
    """Raise AccountingError for modules to save or trained tokens of which the file holds nothing.

    `parameters`: those of the model that the file holds whole.
    """
    held = {name.rpartition(".")[0] for name in parameters}
    lost = [
        module
        for module in context.names.modules()
        if module not in held and is_saved(context.config, module)
    ]
    if lost:
        raise _lost("modules_to_save", lost)
    if context.config.get("trainable_token_indices") and not split_tokens(context.tensors)[0]:
        raise _lost("trainable_token_indices", ())


def check_factors(
    context: Context, factors: Collection[str], general: Callable[[], NameMap | NoNames]
) -> None:
    """Raise AccountingError for modules that the config of a LoRA targets and that `factors` lacks.

    `factors`: paths of the adapted modules, with `.base_layer` where one layer is inside another. Where paths alone
    rouse suspicion, PEFT says what it would adapt in the model of the map that `general` makes: checkpoints may hold
    modules that the model does not have.
    """
    config = context.config
    held = Counter(path.replace(INSIDE, "") for path in factors)
    suspicious = config.get("target_parameters") or any(
        module not in held and reaches(config, module) for module in context.names.modules()
    )
    if not suspicious or config.get("layer_replication"):  # PEFT would replicate the layers once more
        return
    from peft.tuners.lora.layer import LoraLayer

    from merge_adapter.methods.peft_layers.ghost import ghostly
    from merge_adapter.methods.peft_layers.model import adapt
    from merge_adapter.names.conversion import ConvertedNames

    names = context.names if isinstance(context.names, ConvertedNames) else general()
    if not isinstance(names, ConvertedNames):
        return
    adapted = adapt(ghostly(names.model), config)
    lost = [
        layer.path
        for layer in adapted.layers()
        if isinstance(layer.layers[0], LoraLayer) and held[layer.path] < len(layer.layers)
    ]
    if lost:
        raise _lost("target_parameters" if config.get("target_parameters") else "target_modules", lost)


def _lost(key: str, modules: Collection[str]) -> AccountingError:
    taken = f", which takes in {', '.join(list(modules)[:4])}," if modules else ""
    return AccountingError(
        f"adapter_config.json names {key}{taken} but the adapter's file holds nothing of"
        f" {'them' if len(modules) > 1 else 'it'}.",
        tensors=(),
        hint="The file was cut, or saved by a loop that gathers LoRA's factors alone; save the adapter again.",
    )
