"""Creating, seeing, changing and losing repositories."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)


def test_whoami_names_user_organizations_and_role(alice, api):
    """Who a token belongs to, and what it may do."""
    who = alice.whoami()
    assert who["name"] == "alice"
    assert [(org["name"], org["roleInOrg"]) for org in who["orgs"]] == [("acme", "admin")]
    assert who["auth"]["accessToken"]["role"] == "write"
    assert api("hf_carol").whoami()["auth"]["accessToken"]["role"] == "read"


def test_unknown_token_is_told_so(api):
    """A wrong token is not the same as a missing repository."""
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api("hf_wrong").model_info("alice/anything")
    for listed in (HfApi.list_models, HfApi.list_datasets, HfApi.list_spaces):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            list(listed(api("hf_wrong"), author="nobody"))


def test_create_twice(alice):
    """The second time is a conflict unless it is expected."""
    url = alice.create_repo("alice/create-twice")
    assert url.repo_id == "alice/create-twice"
    assert alice.create_repo("alice/create-twice", exist_ok=True).repo_id == "alice/create-twice"
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/create-twice")


@pytest.mark.parametrize("name", ["alice/a..b", "alice/.hidden", "alice/a.git", "alice/" + "x" * 97])
def test_names_that_could_leave_the_folder_are_refused(hub, name):
    """The server checks names itself; the client's check is not enough."""
    import httpx2

    owner, repo_name = name.split("/")
    answer = httpx2.post(
        f"{hub.url}/api/repos/create",
        json={"name": repo_name, "organization": owner},
        headers={"Authorization": "Bearer hf_alice"},
    )
    assert answer.status_code == 400


def test_who_may_create_where(alice, bob, api):
    """Own namespace and organisations one may write in."""
    assert alice.create_repo("acme/model").repo_id == "acme/model"
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("acme/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("alice/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        api("hf_carol").create_repo("carol/other")


def test_private_repositories_do_not_exist_for_others(alice, bob, nobody):
    """Both strangers and anonymous callers get what a missing repository gives."""
    alice.create_repo("alice/private-one", private=True)
    assert alice.model_info("alice/private-one").private
    for other in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            other.model_info("alice/private-one")
        with pytest.raises(RepositoryNotFoundError):
            other.model_info("alice/never-existed")
    assert "alice/private-one" not in [model.id for model in bob.list_models(author="alice")]
    assert "alice/private-one" in [model.id for model in alice.list_models(author="alice")]
    alice.update_repo_settings("alice/private-one", private=False)
    assert nobody.model_info("alice/private-one").private is False


def test_an_id_without_an_owner_names_no_repository(alice, nobody, tmp_path):
    """Configs name such old ones, `gpt2`: clients are told what they are told of any that is missing."""
    for api in (alice, nobody):
        for ask in (
            lambda api=api: api.model_info("gpt2"),
            lambda api=api: api.model_info("gpt2", revision="main"),
            lambda api=api: api.hf_hub_download("gpt2", "config.json", cache_dir=tmp_path),
        ):
            with pytest.raises(RepositoryNotFoundError):
                ask()
        assert not api.repo_exists("gpt2")


def test_gated_files_open_when_access_is_granted(alice, bob, nobody, repo, tmp_path):
    """Metadata stays readable; files need a place in the list."""
    alice.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo)
    alice.update_repo_settings(repo, gated="manual")
    assert bob.model_info(repo).gated == "manual"
    for other in (bob, nobody):
        with pytest.raises(GatedRepoError):
            other.hf_hub_download(repo, "config.json", cache_dir=tmp_path)
    alice.grant_access(repo, "bob")
    assert [request.username for request in alice.list_accepted_access_requests(repo)] == ["bob"]
    assert bob.hf_hub_download(repo, "config.json", cache_dir=tmp_path)
    alice.reject_access_request(repo, "bob", rejection_reason=None)
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download(repo, "config.json", cache_dir=tmp_path / "again")


def test_asking_for_access_waits_or_opens(alice, bob, hub, repo, tmp_path):
    """A manual gate keeps the request; an automatic one grants it."""
    import httpx2

    ask = {"url": f"{hub.url}/{repo}/ask-access", "headers": {"Authorization": "Bearer hf_bob"}}
    alice.update_repo_settings(repo, gated="manual")
    assert httpx2.post(**ask).status_code == 200
    assert [request.username for request in alice.list_pending_access_requests(repo)] == ["bob"]
    alice.accept_access_request(repo, "bob")
    assert bob.hf_hub_download(repo, ".gitattributes", cache_dir=tmp_path)


def test_disabled_repository(alice, hub, repo):
    """Taken down: recognised by the client as such."""
    import httpx2

    headers = {"Authorization": "Bearer hf_alice"}
    httpx2.put(f"{hub.url}/api/models/{repo}/settings", json={"disabled": True}, headers=headers)
    with pytest.raises(DisabledRepoError):
        alice.model_info(repo)


def test_delete(alice, nobody, repo):
    """Gone, and its name free again."""
    alice.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info(repo)
    alice.delete_repo(repo, missing_ok=True)
    alice.create_repo(repo)
    assert [commit.title for commit in alice.list_repo_commits(repo)] == ["initial commit"]


def test_delete_is_not_for_others(bob, repo):
    """Reading rights are not enough."""
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.delete_repo(repo)


def test_moved_repository_is_found_by_both_names(alice, repo):
    """Old links keep working."""
    alice.move_repo(repo, "acme/moved-model")
    assert alice.model_info("acme/moved-model").id == "acme/moved-model"
    assert alice.model_info(repo).id == "acme/moved-model"


def test_list_models_filters_sorts_and_limits(alice, nobody):
    """By base model, tag, author, search; as the card and the files say."""
    card = "---\nbase_model: org/base\ntags: [merge-me]\nlicense: mit\nlanguage: en\n---\n"
    for number in range(3):
        name = f"acme/listed-{number}"
        alice.create_repo(name)
        alice.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name)
    alice.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="acme/listed-1")
    found = nobody.list_models
    assert {model.id for model in found(filter="base_model:org/base")} == {
        f"acme/listed-{n}" for n in range(3)
    }
    assert [model.id for model in found(filter="base_model:adapter:org/base")] == ["acme/listed-1"]
    assert [model.id for model in found(author="acme", filter=["merge-me", "peft"])] == ["acme/listed-1"]
    assert [model.id for model in found(search="LISTED-2")] == ["acme/listed-2"]
    assert len(list(found(author="acme", limit=2))) == 2
    newest = next(iter(found(author="acme", sort="last_modified", cardData=True)))
    assert newest.id == "acme/listed-1"
    assert newest.card_data.base_model == "org/base"
    tags = nobody.model_info("acme/listed-1").tags
    assert {"peft", "merge-me", "license:mit", "en", "base_model:adapter:org/base"} <= set(tags)


def test_collections(alice, bob, repo):
    """As much as naming a set of repositories needs."""
    made = alice.create_collection("My adapters", namespace="alice", description="d")
    assert alice.create_collection("My adapters", namespace="alice", exists_ok=True).slug == made.slug
    alice.add_collection_item(made.slug, repo, "model", note="first")
    seen = bob.get_collection(made.slug)
    assert [(item.item_id, item.item_type, item.note) for item in seen.items] == [(repo, "model", "first")]
    assert made.slug in [one.slug for one in bob.list_collections(owner="alice")]
    alice.delete_collection_item(made.slug, seen.items[0].item_object_id)
    assert alice.get_collection(made.slug).items == []
    with pytest.raises(HfHubHTTPError):
        bob.delete_collection(made.slug)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("license: nonsense", '"license" must be one of'),
        ("base_model_relation: merged", '"base_model_relation" must be one of'),
        ("base_model: ../etc", '"base_model" must be'),
        ("tags: 3", '"tags" must be an array'),
        ("language: english please", '"language"'),
        ("license: [", "Invalid YAML"),
    ],
)
def test_cards_the_hub_refuses(alice, repo, yaml, message):
    """The client asks before it uploads, and nothing is committed."""
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        alice.upload_file(
            path_or_fileobj=f"---\n{yaml}\n---\n".encode(), path_in_repo="README.md", repo_id=repo
        )
    assert alice.list_repo_files(repo) == [".gitattributes"]


def test_card_without_metadata_is_only_warned_about(alice, repo):
    """As on the Hub."""
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        alice.upload_file(path_or_fileobj=b"# no metadata", path_in_repo="README.md", repo_id=repo)
