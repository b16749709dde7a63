"""The GitHub Action: the only part that reads INPUT_* and GITHUB_* and writes outputs, annotations and summaries.

inputs.py     what a user can set, checked
runner.py     what the runner tells: event, workspace, files to write to
events.py     what an event asks for
changes.py    which adapters of the workspace a commit changed; Git LFS
candidates.py the adapters to merge, from the event, the workspace or the Hub
commands.py   workflow commands, and a log that no stranger's text can steer
markdown.py   strangers' text in Markdown
results.py    what became of each adapter; the step's outputs
summary.py    the same for people
feedback.py   the same on GitHub: checks, comments, releases, issues
main.py       all of it in order, and the one boundary where errors become annotations
"""

from __future__ import annotations


def main() -> int:
    """Run the action and return its exit code. The container's entry point is `merge-adapter action`."""
    from merge_adapter.action.main import main as run

    return run()
