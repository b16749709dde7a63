"""The GitHub Action: the only part that reads INPUT_* and GITHUB_* and writes outputs, annotations and summaries.

inputs.py     what a user can set, checked
runner.py     what the runner tells: event, workspace, files to write to
events.py     what an event asks for
changes.py    which adapters of the workspace a commit changed; Git LFS
candidates.py the adapters to merge, from the event, the workspace or the Hub
commands.py   workflow commands, and a log that no stranger's text can steer
markdown.py   strangers' text in Markdown
step.py       what the parts of one run share
merging.py    one adapter through the pipeline
keeping.py    what stays in the workspace for later steps
results.py    what became of each adapter; the step's outputs
summary.py    the same for people; pictures.py its charts
feedback.py   the same on GitHub: checks, comments, releases, issues
table.py      the tables of inputs and outputs in the docs
main.py       all of it in order, and the one boundary where errors become annotations
"""

from __future__ import annotations


def main() -> int:
    """Run the action and return its exit code. The container's entry point is `merge-adapter action`."""
    from merge_adapter.action.main import main as run

    return run()
