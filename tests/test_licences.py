"""Which licence a merged model carries."""

from __future__ import annotations

import pytest

from merge_adapter.errors import ExitCode, PolicyError
from merge_adapter.licences import Licence, decide_licence, read_licence


@pytest.mark.parametrize(
    ("adapter", "base", "expected"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0"),
        ("mit", "llama3.1", "llama3.1"),
        ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0"),
        ("", "gemma", "gemma"),
        ("unknown", "gemma", "gemma"),
        ("mit", "", "mit"),
        ("gemma", "unknown", "gemma"),
        ("gpl-3.0", "agpl-3.0", "agpl-3.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        ("", "", ""),
    ],
)
def test_the_more_demanding_licence_binds_the_whole(adapter: str, base: str, expected: str) -> None:
    """A permissive or unstated licence gives way to the other one."""
    assert decide_licence(Licence(adapter), Licence(base)).licence.id == expected


def test_a_changed_licence_is_said() -> None:
    """Wherever the merged model's licence is not the adapter's own, there is a note to show."""
    assert "llama3.1" in decide_licence(Licence("mit"), Licence("llama3.1")).note
    assert "no licence" in decide_licence(Licence(""), Licence("gemma")).note
    assert "Neither" in decide_licence(Licence(""), Licence("")).note
    assert decide_licence(Licence("mit"), Licence("mit")).note == ""


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ("gpl-3.0", "llama3.1"),
        ("llama3", "llama3.1"),
        ("gemma", "cc-by-nc-4.0"),
        ("other", "other"),
        ("other", "llama2"),
        ("openrail", "gpl-3.0"),
    ],
)
def test_licences_that_conflict_are_refused(adapter: str, base: str) -> None:
    """Exit 6, both licences in the message, the way out in the hint."""
    with pytest.raises(PolicyError, match="conflict") as caught:
        decide_licence(Licence(adapter), Licence(base))
    assert adapter in caught.value.message
    assert base in caught.value.message
    assert "--license" in caught.value.hint
    assert caught.value.exit_code is ExitCode.POLICY


def test_custom_licences_are_told_apart_by_their_name() -> None:
    """`other` says nothing: only an equal name or link makes two of them the same."""
    named = Licence("other", name="tongyi-qianwen")
    assert decide_licence(named, Licence("other", name="tongyi-qianwen")).licence == named
    with pytest.raises(PolicyError):
        decide_licence(named, Licence("other", name="deepseek"))


@pytest.mark.parametrize("base", ["cc-by-nc-nd-4.0", "cc-by-nd-4.0"])
def test_no_derivatives_means_no_merged_model(base: str) -> None:
    """Even where adapter and base agree: a merged model is a derived work of both."""
    with pytest.raises(PolicyError, match="derived"):
        decide_licence(Licence(base), Licence(base))


def test_a_licence_that_is_given_decides_and_is_said() -> None:
    """--license overrides a conflict, and the note keeps what the sources stated."""
    decision = decide_licence(Licence("gemma"), Licence("llama3"), given="Other")
    assert decision.licence.id == "other"
    assert "gemma" in decision.note
    assert "llama3" in decision.note


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({}, Licence("")),
        ({"license": "MIT"}, Licence("mit")),
        ({"license": ["mit", "apache-2.0"]}, Licence("apache-2.0 and mit")),
        ({"license": 3}, Licence("")),
        ({"license": "other", "license_name": " a\n b "}, Licence("other", "a b")),
    ],
)
def test_licence_fields_are_read_as_text_or_not_at_all(card: dict[str, object], expected: Licence) -> None:
    """Cards are written by anybody: a number is no licence."""
    assert read_licence(card) == expected


def test_a_list_is_permissive_only_when_all_of_it_is() -> None:
    """Two licences at once bind together."""
    assert Licence("apache-2.0 and mit").permissive
    assert not Licence("apache-2.0 and gpl-3.0").permissive
