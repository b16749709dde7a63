"""Hugging Face Jobs: what hardware there is, and one job followed from start to end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from merge_adapter.errors import HubError, NotFoundError
from merge_adapter.hub.errors import status_of
from merge_adapter.hub.session import once, repeat

if TYPE_CHECKING:
    from huggingface_hub import JobInfo

    from merge_adapter.hub.client import Hub

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(MB|GB|TB)")
_PER_HOUR = {"second": 3600, "minute": 60, "hour": 1}
FINAL = frozenset({"COMPLETED", "ERROR", "CANCELED", "DELETED"})
LABEL = "merge-adapter-job"
"""Label of the jobs that the bot starts; its value is the id in the bot's queue."""


@dataclass(frozen=True)
class Flavour:
    """Hardware that a job can have."""

    name: str
    memory_bytes: int
    disk_bytes: int | None
    """None: the Hub does not say."""
    gpu: bool
    dollars_per_hour: float


@dataclass(frozen=True)
class RemoteJob:
    """A job on the Hub as it stands."""

    id: str
    stage: str
    """SCHEDULING, RUNNING, or one of FINAL."""
    message: str

    @property
    def ended(self) -> bool:
        return self.stage in FINAL


@dataclass(frozen=True)
class JobSpec:
    """A job to start. `secrets` reach the job alone."""

    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    flavour: str
    timeout: float
    """Seconds."""
    label: str


def hardware(hub: Hub) -> tuple[Flavour, ...]:
    """All hardware, the cheapest first."""
    with hub.calling("list the hardware for jobs"):
        listed = repeat(hub.api.list_jobs_hardware, hub.patience)
    flavours = [
        Flavour(
            one.name,
            amount(one.ram) or 0,
            amount(one.ephemeral_storage),
            one.accelerator is not None,
            one.unit_cost_usd * _PER_HOUR.get(one.unit_label, 60),
        )
        for one in listed
    ]
    return tuple(sorted(flavours, key=lambda one: (one.dollars_per_hour, one.memory_bytes)))


def amount(text: str) -> int | None:
    """Bytes in a text such as "16 GB"; None where it names none."""
    found = _AMOUNT.search(text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def start_job(hub: Hub, spec: JobSpec, *, namespace: str) -> RemoteJob:
    """Start a job; the one with its label where there is one, ended or not, so that a lost answer starts no second."""

    def look() -> JobInfo | None:
        return next(iter(_labelled(hub, spec.label, namespace)), None)

    with hub.calling(f"start a job under {namespace}"):
        found = repeat(look, hub.patience) or once(
            lambda: hub.api.run_job(
                image=spec.image,
                command=list(spec.command),
                env=dict(spec.environment),
                secrets=dict(spec.secrets),
                flavor=spec.flavour,
                timeout=int(spec.timeout),
                labels={LABEL: spec.label},
                namespace=namespace,
            ),
            look,
            hub.patience,
        )
    return _remote(found)


def look_at_job(hub: Hub, job_id: str, *, namespace: str) -> RemoteJob | None:
    """A job as it stands; None when there is none of that id, or no longer."""
    try:
        with hub.calling(f"look at job {job_id}"):
            return _remote(
                repeat(lambda: hub.api.inspect_job(job_id=job_id, namespace=namespace), hub.patience)
            )
    except (HubError, NotFoundError) as error:
        if status_of(error) == HTTPStatus.NOT_FOUND:
            return None
        raise


def cancel_job(hub: Hub, job_id: str, *, namespace: str) -> None:
    """Stop a job."""
    with hub.calling(f"cancel job {job_id}"):
        hub.api.cancel_job(job_id=job_id, namespace=namespace)


def job_log(hub: Hub, job_id: str, *, namespace: str, follow: bool) -> Iterator[str]:
    """Lines of a job's log; with `follow` until it ends."""
    with hub.calling(f"read the log of job {job_id}"):
        yield from hub.api.fetch_job_logs(job_id=job_id, namespace=namespace, follow=follow)


def _labelled(hub: Hub, label: str, namespace: str) -> list[JobInfo]:
    return [
        info
        for info in hub.api.list_jobs(labels={LABEL: label}, namespace=namespace)
        if (info.labels or {}).get(LABEL) == label
    ]


def _remote(info: JobInfo) -> RemoteJob:
    stage = getattr(info.status.stage, "value", info.status.stage)
    return RemoteJob(info.id, str(stage), info.status.message or "")
