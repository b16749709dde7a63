"""What Prometheus reads: counts from the store, and answers to webhooks counted here. No names of anybody."""

from __future__ import annotations

import threading
import time
from collections import Counter

from merge_adapter.bot.inbox import Inbox
from merge_adapter.bot.jobs import JobState
from merge_adapter.bot.rows import count_jobs, oldest_waiting

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds, in seconds, of the histogram of answer times; the promise is 0.1."""


class Metrics:
    """Counters of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[str] = Counter()
        self._buckets = [0] * len(BUCKETS)
        self._seconds = 0.0
        self.started = time.time()

    def answered(self, outcome: str, seconds: float) -> None:
        """A webhook was answered: `accepted`, `duplicate`, `ignored`, `refused` or `failed`."""
        with self._lock:
            self._answers[outcome] += 1
            self._seconds += seconds
            for index, bound in enumerate(BUCKETS):
                self._buckets[index] += seconds <= bound

    def text(self, inbox: Inbox, *, workers: int) -> str:
        """The metrics in Prometheus' text format 0.0.4."""
        counts = count_jobs(inbox.store)
        oldest = oldest_waiting(inbox.store)
        waits = 0.0 if oldest is None else max(0.0, inbox.store.clock() - oldest)
        with self._lock:
            answers, buckets, seconds = dict(self._answers), list(self._buckets), self._seconds
        total = sum(answers.values())
        lines = [
            *_head("jobs", "gauge", "Jobs in the store by state."),
            *(f'merge_adapter_jobs{{state="{state.value}"}} {counts.get(state, 0)}' for state in JobState),
            *_head("oldest_waiting_seconds", "gauge", "Age of the job that waits longest and might run."),
            f"merge_adapter_oldest_waiting_seconds {waits:.3f}",
            *_head("events_waiting", "gauge", "Webhook events that wait for their look-up on the Hub."),
            f"merge_adapter_events_waiting {inbox.waiting()}",
            *_head("workers", "gauge", "Worker processes that are alive."),
            f"merge_adapter_workers {workers}",
            *_head("webhooks_total", "counter", "Webhooks by answer."),
            *(f'merge_adapter_webhooks_total{{outcome="{name}"}} {n}' for name, n in sorted(answers.items())),
            *_head("webhook_seconds", "histogram", "Time to answer a webhook."),
            *(
                f'merge_adapter_webhook_seconds_bucket{{le="{bound:g}"}} {n}'
                for bound, n in zip(BUCKETS, buckets, strict=True)
            ),
            f'merge_adapter_webhook_seconds_bucket{{le="+Inf"}} {total}',
            f"merge_adapter_webhook_seconds_sum {seconds:.6f}",
            f"merge_adapter_webhook_seconds_count {total}",
            *_head("start_time_seconds", "gauge", "When this server started, since the epoch."),
            f"merge_adapter_start_time_seconds {self.started:.3f}",
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP merge_adapter_{name} {text}", f"# TYPE merge_adapter_{name} {kind}"
