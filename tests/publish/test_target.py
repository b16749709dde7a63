"""Where a merge goes when nobody says."""

from __future__ import annotations

import pytest

from merge_adapter.publish.target import default_name


@pytest.mark.parametrize(
    ("name", "subfolder", "target"),
    [
        ("ada/style", "", "style-merged"),
        ("ada/style", "checkpoint-500", "style-checkpoint-500-merged"),
        ("ada/style", "loras/b", "style-loras-b-merged"),
        ("ada/style", "a--b/c d", "style-a-b-c-d-merged"),
        ("ada/style", "..", "style-merged"),
        ("folder of mine", "", "folder-of-mine-merged"),
        ("", "", "adapter-merged"),
    ],
)
def test_each_adapter_of_a_repository_has_a_repository_of_its_own(
    name: str, subfolder: str, target: str
) -> None:
    assert default_name(name, subfolder) == target


def test_long_names_stay_apart_and_fit_the_hub() -> None:
    """Cut at the end alone, adapters of one repository would share a target."""
    made = {default_name("ada/" + "x" * 96, subfolder) for subfolder in ("", "a", "b")}
    assert len(made) == 3 and all(len(name) <= 96 for name in made)
