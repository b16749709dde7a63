"""What adapter_config.json says was trained, and the adapter's file lacks: PEFT would not load such an adapter.

Factors that are missing show where they are paired; these stand alone, and without them the base's own would be kept.
"""

from __future__ import annotations

from collections.abc import Collection

from merge_adapter.errors import AccountingError
from merge_adapter.methods.change import Context
from merge_adapter.methods.replacements import is_saved
from merge_adapter.methods.tokens import split_tokens


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
        raise _lost(f"modules_to_save, which takes in {', '.join(lost[:4])},", len(lost))
    if context.config.get("trainable_token_indices") and not split_tokens(context.tensors)[0]:
        raise _lost("trainable_token_indices", 1)


def _lost(what: str, count: int) -> AccountingError:
    return AccountingError(
        f"adapter_config.json names {what} but the adapter's file holds nothing of {'them' if count > 1 else 'it'}.",
        tensors=(),
        hint="The file was cut, or saved by a loop that gathers LoRA's factors alone; save the adapter again.",
    )
