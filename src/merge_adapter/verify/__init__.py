"""The equivalence gate: is this merged model base + adapter, or not, or can that not be shown?

    from merge_adapter.verify import VerifySettings, verify

The gate shares no arithmetic, no parsing and no mapping of names with the code that merges. See docs/equivalence.md.
Importing this package loads no model library; `verify` does when it is called.
"""

from __future__ import annotations

from pathlib import Path

from merge_adapter.methods.refuse import SOFT_PROMPTS
from merge_adapter.types import Progress, Resolved, Silent, Verification
from merge_adapter.verify.settings import VerifySettings

__all__ = ["VerifySettings", "verify"]


def verify(
    merged: Path,
    sources: Resolved,
    *,
    settings: VerifySettings | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Judge the merged model in the folder `merged`, whoever made it, against base + adapter. Writes nothing there.

    Memory: weights stay mapped from their files; fp32 and fp64 exist a row block or one tensor at a time. Starts one
    process of its own for the merged model. Raises NotFoundError or MalformedError for sources that cannot be read,
    BaseModelError for a base transformers cannot load, MethodError for an adapter PEFT cannot load or merge.
    What is wrong with the merged folder is never raised: it is the verdict.
    """
    if sources.adapter.method in SOFT_PROMPTS:
        from merge_adapter.verify.soft_prompt.gate import SoftPromptGate

        return SoftPromptGate(merged, sources, settings or VerifySettings(), progress or Silent()).run()
    from merge_adapter.verify.gate import Gate

    return Gate(merged, sources, settings or VerifySettings(), progress or Silent()).run()
