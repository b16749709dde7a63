"""Pages for people."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd

EVIL = """---
license: mit
tags: ["<b>x</b>"]
---
# Title

<script>alert(1)</script> [bad](javascript:alert(1)) ![img](http://elsewhere/x.png)

| a | b |
|---|---|
| 1 | 2 |
"""


def _get(hub, path, **more):
    return httpx2.get(f"{hub.url}{path}", headers={"Accept": "text/html"}, **more)


def test_readme_is_rendered_and_escaped(hub, alice, repo):
    """Markdown becomes HTML, HTML becomes text, and nothing is fetched from elsewhere."""
    alice.create_commit(repo, [CommitOperationAdd("README.md", EVIL.encode())], commit_message="<i>m</i>")
    page = _get(hub, f"/{repo}")
    assert "<h1>Title</h1>" in page.text
    assert "<td>1</td>" in page.text
    assert "&lt;script&gt;" in page.text
    assert "<script" not in page.text
    assert 'href="javascript' not in page.text
    assert "&lt;b&gt;x&lt;/b&gt;" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "img-src 'self'" in policy
    assert "&lt;i&gt;m&lt;/i&gt;" in _get(hub, f"/{repo}/commits/main").text


def test_every_page_of_a_pull_request_repository(hub, alice, bob, repo):
    """Files, folders, a file, history, commits, the list, the request with its diff and comments."""
    alice.create_commit(
        repo,
        [CommitOperationAdd("dir/a b.txt", b"<one>\ntwo\n"), CommitOperationAdd("w.bin", b"\x00" * 5000)],
        commit_message="files",
    )
    pr = bob.create_commit(
        repo, [CommitOperationAdd("dir/a b.txt", b"<one>\nTWO\n")], commit_message="Shout", create_pr=True
    )
    alice.comment_discussion(repo, 1, "Looks **good** <script>")
    assert repo in _get(hub, "/").text
    assert repo in _get(hub, "/alice").text
    assert "dir/" in _get(hub, f"/{repo}/tree/main").text
    assert "a b.txt" in _get(hub, f"/{repo}/tree/main/dir").text
    assert "&lt;one&gt;" in _get(hub, f"/{repo}/blob/main/dir/a%20b.txt").text
    assert "5 kB" in _get(hub, f"/{repo}/blob/main/w.bin").text
    assert "TWO" in _get(hub, f"/{repo}/blob/refs%2Fpr%2F1/dir/a%20b.txt").text
    assert "TWO" in _get(hub, f"/{repo}/blob/refs/pr/1/dir/a%20b.txt").text
    assert "Shout" in _get(hub, f"/{repo}/commit/{pr.oid}").text
    assert "Shout" in _get(hub, f"/{repo}/discussions").text
    page = _get(hub, f"/{repo}/discussions/1").text
    assert '<div class="add">+TWO</div>' in page
    assert '<div class="del">-two</div>' in page
    assert "<strong>good</strong>" in page
    assert "<script>" not in page
    assert 'class="status open"' in page
    alice.merge_pull_request(repo, 1)
    assert "merged as" in _get(hub, f"/{repo}/discussions/1").text


def test_datasets_have_their_own_addresses(hub, alice):
    """`/datasets/owner/name`, also for downloads."""
    alice.create_repo("alice/data-page", repo_type="dataset")
    alice.upload_file(
        path_or_fileobj=b"1", path_in_repo="x.csv", repo_id="alice/data-page", repo_type="dataset"
    )
    assert "x.csv" in _get(hub, "/datasets/alice/data-page/tree/main").text
    assert _get(hub, "/datasets/alice/data-page/resolve/main/x.csv").content == b"1"
    assert _get(hub, "/alice/data-page").status_code == 401


def test_private_pages_need_a_login(hub, alice):
    """A cookie that only opens pages; signing out forgets it."""
    alice.create_repo("alice/private-page", private=True)
    assert _get(hub, "/alice/private-page").status_code == 401
    assert "private-page" not in _get(hub, "/").text
    with httpx2.Client(base_url=hub.url, headers={"Accept": "text/html"}, follow_redirects=True) as browser:
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401
        assert "private-page" in browser.post("/login", data={"token": "hf_alice"}).text
        assert browser.get("/alice/private-page").status_code == 200
        written = browser.post("/api/repos/create", json={"name": "by-cookie"})
        assert written.status_code == 401
        assert "private-page" not in browser.post("/logout").text


def test_cookie_of_another_hub_is_ignored(hub):
    """Browsers send cookies to every port of a host; a strange one must not lock a person out."""
    assert _get(hub, "/", cookies={"localhub_token": "of another"}).status_code == 200


def test_missing_pages(hub):
    """A page with the reason; control characters are refused outright."""
    assert _get(hub, "/alice/never-was").status_code == 401
    assert "404" in _get(hub, "/nobody-here").text
    assert _get(hub, "/alice/x%00y").status_code == 400
    assert _get(hub, "/static/..%2Frender.py").status_code == 404
    assert _get(hub, "/static/style.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [
        ("<!-- marker=1 -->\n\nWords", "Words", "marker"),
        ("Words <!-- marker=1 --> and more", "and more", "marker"),
        (
            "<details><summary>Open</summary>\n\n**in**\n\n</details>",
            "<details><summary>Open</summary>",
            "&lt;",
        ),
        ("<script>alert(1)</script>", "&lt;script&gt;", "<script"),
        ('<details ontoggle="x()">', "&lt;details", "<details"),
        ("<!-- a --><img src=x onerror=y>", "&lt;img", "<img"),
        ("<!-- open <script>x</script>", "&lt;script&gt;", "<script"),
    ],
)
def test_raw_html_is_harmless(text: str, shown: str, hidden: str) -> None:
    from localhub.pages.render import markdown

    page = str(markdown(text))
    assert shown in page
    assert hidden not in page


def test_a_long_file_does_not_hide_the_files_behind_it() -> None:
    """A tokenizer of tens of thousands of lines stands before the weights in every merge's diff."""
    from localhub.pages.render import MAX_DIFF_LINES, MAX_FILE_LINES, diff_lines

    patch = "".join(
        f"diff --git a/{name} b/{name}\n@@ -0,0 +1,{lines} @@\n" + "+x\n" * lines
        for name, lines in (("long", 10 * MAX_FILE_LINES), ("short", 3))
    )
    lines = diff_lines(patch)
    assert [line.text for line in lines if line.style == "file"] == ["long", "short"]
    assert [line.text for line in lines][-3:] == ["+x"] * 3
    assert len(lines) == 2 + (MAX_FILE_LINES + 1) + 4
    assert len(diff_lines(patch * 100)) <= MAX_DIFF_LINES + 1 + 2 * 100 + 100
