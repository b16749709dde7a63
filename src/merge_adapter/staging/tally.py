"""What the units of a merge added up to."""

from __future__ import annotations

from dataclasses import dataclass, field

from merge_adapter.plan import MergePlan
from merge_adapter.publish.contents import Gone
from merge_adapter.types import FileOrigin, MergeResult, OutputFile


@dataclass
class Tally:
    """Grows with every unit."""

    files: dict[str, OutputFile] = field(default_factory=dict)
    gone: dict[str, Gone] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_read: int = 0
    tensors_changed: int = 0
    retained: dict[str, float] = field(default_factory=dict)

    def add(self, made: MergeResult) -> None:
        self.files |= {file.path: file for file in made.files}
        self.seconds += made.seconds
        self.bytes_read += made.bytes_read
        self.tensors_changed += made.tensors_changed
        self.retained |= made.retained

    def result(self, plan: MergePlan) -> MergeResult:
        """As the merge of the whole would give it, for the files there are so far."""
        files = tuple(self.files.values())
        tensors = sum(len(shard.tensors) for shard in plan.outputs)
        return MergeResult(
            files=files,
            seconds=self.seconds,
            bytes_read=self.bytes_read,
            bytes_written=sum(file.bytes for file in files if file.origin is not FileOrigin.COPIED),
            bytes_changed=plan.bytes_changed,
            tensors_changed=self.tensors_changed,
            tensors_copied=tensors - self.tensors_changed,
            retained=self.retained,
        )
