"""A job's options as the pipeline takes them, for what looks at a job's sources without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_adapter.bot.jobs import JobRequest
from merge_adapter.errors import InputError, PolicyError, StorageError, UnmergeableError
from merge_adapter.hub.errors import RefusedError
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import Combination, MergeSettings

if TYPE_CHECKING:
    from merge_adapter.hub import Hub
    from merge_adapter.publish.settings import Source


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


def sources_of(request: JobRequest, hub: Hub) -> tuple[Source, ...]:
    """Adapters and base of a job, as the policy sees them. Raises what `resolve` raises."""
    from merge_adapter.publish.policy import inspect

    found = resolve(source_of(request), hub=hub, quantized_base=request.options.quantized_base)
    opened = [*(one.repository for one in found.adapters), found.base.repository]
    return tuple(inspect("source", one)[0] for one in opened)


def private_sources(request: JobRequest, hub: Hub) -> tuple[Source, ...]:
    """What a job reads that strangers may not: its log and its report show what that answers.

    What cannot be resolved is not read, and the job will say so. Raises RemoteError when the Hub fails, StorageError.
    """
    from merge_adapter.publish.settings import Openness

    found: list[Source] = []
    for look in (sources_of, _judged):
        try:
            found += look(request, hub)
        except StorageError:  # an InputError too, but this machine's fault
            raise
        except (InputError, PolicyError, UnmergeableError, RefusedError):
            continue
    return tuple(one for one in found if one.openness is Openness.PRIVATE)


def _judged(request: JobRequest, hub: Hub) -> tuple[Source, ...]:
    """The checkpoint that a verification judges."""
    from merge_adapter.publish.policy import inspect

    if request.options.merged is None:
        return ()
    name, _, revision = request.options.merged.partition("@")
    return (inspect("checkpoint", hub.open(name, revision=revision or None))[0],)
