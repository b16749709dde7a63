"""Who may see a merged model."""

from __future__ import annotations

import pytest

from merge_adapter.errors import InputError, PolicyError
from merge_adapter.publish import policy
from merge_adapter.publish.settings import Openness, PublishSettings, Source
from merge_adapter.publish.target import clean_folder

PUBLIC = Source("adapter", "ann/adapter")


def closed(openness: Openness = Openness.PRIVATE) -> Source:
    return Source("base", "corp/base", openness)


@pytest.mark.parametrize(
    ("private", "gated", "expected"),
    [
        (False, None, Openness.PUBLIC),
        (False, "auto", Openness.GATED_AUTO),
        (False, "manual", Openness.GATED_MANUAL),
        (True, "auto", Openness.PRIVATE),
    ],
)
def test_openness_is_read_from_the_fields_of_the_hub(
    private: bool, gated: str | None, expected: Openness
) -> None:
    """Private beats gated."""
    assert policy.openness_of(private=private, gated=gated) is expected


def test_the_most_closed_source_decides() -> None:
    """One private source makes the whole private."""
    assert policy.required_openness([PUBLIC, closed()]) is Openness.PRIVATE
    assert policy.required_openness([PUBLIC]) is Openness.PUBLIC


@pytest.mark.parametrize("found", [Openness.PUBLIC, Openness.GATED_AUTO])
def test_a_target_more_open_than_a_source_is_refused(found: Openness) -> None:
    """An existing repository is not made private behind its owner's back: it is refused."""
    with pytest.raises(PolicyError, match="in the open"):
        policy.check_openness("ann/merged", found, Openness.GATED_MANUAL)


def test_asking_for_a_public_repository_does_not_open_a_closed_source() -> None:
    """--public is an error then, not silently ignored."""
    with pytest.raises(PolicyError, match="--public"):
        policy.check_wish(PublishSettings(private=False), Openness.GATED_AUTO)
    policy.check_wish(PublishSettings(private=False), Openness.PUBLIC)


def test_a_closed_base_does_not_reach_strangers_through_an_adapter_that_names_it() -> None:
    """The bot reads the base with its own token; the adapter's owner must not gain the weights by that."""
    with pytest.raises(PolicyError, match="may not have access") as caught:
        policy.check_audience([PUBLIC, closed()], owner="ann", user="bot", named_by_user=False, allow_base=())
    assert "--allow-base corp/base" in caught.value.hint


@pytest.mark.parametrize(
    ("owner", "user", "named", "allowed"),
    [
        ("corp", "bot", False, ()),
        ("ann", "ann", False, ()),
        ("ann", "bot", True, ()),
        ("ann", "bot", False, ("corp/*",)),
    ],
)
def test_a_closed_base_may_go_where_somebody_answers_for_it(
    owner: str, user: str, named: bool, allowed: tuple[str, ...]
) -> None:
    """To its own owner, to the account that reads it, or where the person who runs this says so."""
    policy.check_audience(
        [PUBLIC, closed(Openness.GATED_AUTO)],
        owner=owner,
        user=user,
        named_by_user=named,
        allow_base=allowed,
    )


@pytest.mark.parametrize(
    ("pattern", "repo_id", "expected"),
    [
        ("meta-llama/*", "meta-llama/Llama-3.2-1B", True),
        ("Meta-Llama/*", "meta-llama/Llama-3.2-1B", True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-evil", False),
        ("meta-llama/*", "meta-llama-evil/x", False),
        ("meta-llama/*", "evil/meta-llama", False),
        ("meta-llama/*", None, False),
    ],
)
def test_allowed_bases_are_matched_whole(pattern: str, repo_id: str | None, expected: bool) -> None:
    """A star stands for names of one owner and never crosses the slash."""
    assert policy.allows((pattern,), repo_id) is expected


@pytest.mark.parametrize("pattern", ["*", "*/*", "meta*/x", "name", "/x"])
def test_a_pattern_that_would_allow_anybody_is_an_error(pattern: str) -> None:
    """Better no run than a list that does not protect."""
    with pytest.raises(InputError, match="does not name a base"):
        policy.allows((pattern,), "ann/base")


def test_a_base_that_is_not_listed_is_refused_with_the_option_that_allows_it() -> None:
    """No list allows all; a list allows what it names, local folders not among them."""
    policy.check_base(closed(), ())
    policy.check_base(closed(), ("corp/*",))
    with pytest.raises(PolicyError, match="not among the allowed") as caught:
        policy.check_base(closed(), ("meta-llama/*",))
    assert "--allow-base corp/base" in caught.value.hint
    with pytest.raises(PolicyError):
        policy.check_base(Source("base", None), ("corp/*",))


@pytest.mark.parametrize("path", ["../x", "a/../b", "a//b", ".git", "a/.git/b", "a\\b", "a/\x00", "a/./b"])
def test_a_folder_in_a_repository_stays_inside_it(path: str) -> None:
    """Paths come from workflows and configs too."""
    with pytest.raises(InputError, match="not a folder inside"):
        clean_folder(path)


def test_outer_slashes_of_a_folder_do_not_matter() -> None:
    """People write them both ways."""
    assert clean_folder("/merged/bf16/") == "merged/bf16"
    assert clean_folder("./merged/") == "merged"
    assert clean_folder("") == ""


@pytest.mark.parametrize("path", [".", "./", "/"])
def test_the_root_of_a_repository_is_named_as_for_hf_upload(path: str) -> None:
    assert clean_folder(path) == ""
