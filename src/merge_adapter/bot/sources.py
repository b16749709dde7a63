"""A job's options as the pipeline takes them, for what looks at a job's sources without running it."""

from __future__ import annotations

from merge_adapter.bot.jobs import JobRequest
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Combination, MergeSettings


def source_of(request: JobRequest) -> SourceRequest:
    """The sources of a job. Strangers named them, so no folder of this machine can be meant."""
    options = request.options
    return SourceRequest(
        (f"{request.adapter}@{request.revision}", *options.adapters),
        options.weights,
        options.base_model,
        options.base_revision,
        request.subfolder,
        Combination(options.combination, options.density, svd_rank=options.svd_rank),
        options.soft_prompt,
        local_paths=False,
    )


def settings_of(request: JobRequest) -> MergeSettings:
    """How a job merges."""
    options = request.options
    return MergeSettings(
        dtype=options.dtype,
        strategy=options.strategy,
        quantized_base=options.quantized_base,
        soft_prompt=options.soft_prompt,
    )
