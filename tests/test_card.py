"""The card of a merged model: metadata the Hub takes, code that runs, and foreign text kept in its place."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from localhub.card_rules import check_card
from merge_adapter.card import write_card
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.packaging.markdown import code, quoted, sentence
from merge_adapter.types import Adapter, BaseModel, Origin, Resolved, Strategy

ADAPTER_SHA = "a" * 40
BASE_SHA = "b" * 40
REPORT = {
    "tool": {"name": "merge-adapter", "version": "0.1.0", "torch": "2.13.0"},
    "output": {"dtype": "auto"},
    "verification": {"verdict": "pass", "reasons": ["Every part agreed."]},
    "notes": ["A <b>note</b> with [a link](x)."],
}


class Pinned(Folder):
    """A folder that says it is a repository of the Hub."""

    def __init__(self, path: Path, repo_id: str, revision: str) -> None:
        super().__init__(path)
        self._origin = Origin(repo_id=repo_id, revision=revision)


def card_of(
    folder: Path,
    *,
    adapter_card: str = "",
    base_card: str = "---\nlicense: mit\n---\n",
    config: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """The card of a merge of two small repositories with these cards."""
    config = config or {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name, card in (("adapter", adapter_card), ("base", base_card), ("out", "")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "README.md").write_text(card)
    (folder / "out" / "config.json").write_text(json.dumps(config))
    adapter_config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True}
    base = Pinned(folder / "base", "demo/llama", BASE_SHA)
    sources = Resolved(
        adapters=(Adapter(Pinned(folder / "adapter", "ada/answers", ADAPTER_SHA), adapter_config, "LORA"),),
        base=BaseModel(base, config),
        tokenizer=base,
    )
    plan: Any = SimpleNamespace(strategy=Strategy.STREAM, consumed=14, adapter_tensors=14)
    written = write_card(folder / "out", sources=sources, plan=plan, report=report or REPORT, **options)
    content = (folder / "out" / "README.md").read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert check_card(content.decode(), "model").errors == []
    return content.decode()


def test_metadata_comes_from_both_sources(tmp_path: Path) -> None:
    """Licence and language of the sources, datasets of the adapter; tags of adapters are gone."""
    text = card_of(
        tmp_path,
        adapter_card="---\nlicense: mit\nlanguage: [en]\ndatasets:\n- ada/questions\n"
        "tags: [lora, peft, 'base_model:adapter:demo/llama', chat]\nlibrary_name: peft\n---\n# Answers\n",
    )
    assert ModelCard(text).data.to_dict() == {
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["demo/llama"],
        "base_model_relation": "finetune",
        "datasets": ["ada/questions"],
        "tags": ["chat", "merge-adapter"],
    }


def test_body_tells_provenance_and_verdict(tmp_path: Path) -> None:
    """Ids with their commits, method and rank, what the gate said, and what the adapter's author wrote."""
    text = card_of(
        tmp_path, adapter_card="# Answers\n\nIt answers.", table="| part | result |\n|---|---|\n| a | b |"
    )
    for expected in (
        f"https://huggingface.co/ada/answers/tree/{ADAPTER_SHA}",
        f"https://huggingface.co/demo/llama/tree/{BASE_SHA}",
        "`LORA`, rank 8, alpha 16, rsLoRA",
        "14 of 14 merged",
        "## Equivalence: pass",
        "| part | result |",
        "> ### Answers\n>\n> It answers.",
    ):
        assert expected in text
    assert "A \\<b\\>note\\</b\\> with \\[a link\\](x)." in text


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_merge_that_did_not_pass_warns(verdict: str, tmp_path: Path) -> None:
    """Nobody can mistake a rejected model for an accepted one."""
    text = card_of(tmp_path, report={**REPORT, "verification": {"verdict": verdict, "reasons": []}})
    assert f"## Equivalence: {verdict}" in text
    assert "found equivalent" not in text


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM.from_pretrained("),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification.from_pretrained("),
        ("BertForTokenClassification", "AutoModelForTokenClassification.from_pretrained("),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering.from_pretrained("),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM.from_pretrained("),
        ("BertModel", "AutoModel.from_pretrained("),
    ],
)
def test_usage_fits_the_architecture(architecture: str, expected: str, tmp_path: Path) -> None:
    """The snippet is Python and loads the class the config names."""
    text = card_of(
        tmp_path,
        config={"architectures": [architecture], "is_encoder_decoder": architecture.startswith("T5")},
    )
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    compile(snippet[1], "card", "exec")
    assert expected in snippet[1]
    assert '"ada/answers-merged"' in snippet[1]


@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("subfolder", ["merged", 'my "best" {model}'])
def test_usage_finds_a_subfolder(modules: bool, subfolder: str, tmp_path: Path) -> None:
    """A model below a folder of its repository is loaded from there, whatever that is called."""
    (tmp_path / "out").mkdir()
    if modules:
        (tmp_path / "out" / "modules.json").write_text("[]")
    text = card_of(tmp_path, place="ada/answers", subfolder=subfolder)
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    named = [one.value for one in ast.walk(ast.parse(snippet[1])) if isinstance(one, ast.Constant)]
    assert {"ada/answers", f"{subfolder}/*", f"/{subfolder}"} <= set(named)
    assert ("SentenceTransformer(folder)" if modules else ".from_pretrained(folder") in snippet[1]


def test_conflicting_licences_are_both_named(tmp_path: Path) -> None:
    """A card cannot settle a conflict; it hides none either. A licence that was chosen settles it."""
    cards = {
        "adapter_card": "---\nlicense: cc-by-nc-4.0\n---\n",
        "base_card": "---\nlicense: gpl-3.0\n---\n",
    }
    data = ModelCard(card_of(tmp_path, **cards)).data
    assert (data.license, data.license_name) == ("other", "gpl-3.0-and-cc-by-nc-4.0")
    assert ModelCard(card_of(tmp_path, **cards, license="gpl-3.0")).data.license == "gpl-3.0"


HOSTILE_METADATA = (
    "license: '<script>'\nlanguage: [en, '../../etc']\ntags: ['a\\nb: c', '<img>', good]\n"
    "datasets: ['../../x', {a: b}, ok/data]\npipeline_tag: [x]\nbase_model: evil/model\n"
    "extra: !!python/name:os.system\n",
    "license: [mit, '']\ntags: good\nlanguage: 7\n",
    "- just\n- a list\n",
    "a: &a [x]\nb: [*a, *a]\nlicense: {deep: [",
    "x: " + "[" * 3000,
)


@pytest.mark.parametrize("block", HOSTILE_METADATA)
def test_hostile_metadata_leaves_a_valid_block(block: str, tmp_path: Path) -> None:
    """Only values of the right form are carried over; a block that is no YAML counts as none."""
    data = ModelCard(card_of(tmp_path, adapter_card=f"---\n{block}---\n# Answers\n")).data.to_dict()
    assert data["license"] == "mit"
    assert data["base_model"] == ["demo/llama"]
    assert set(data.get("tags", [])) <= {"good", "merge-adapter"}
    assert data.get("datasets", ["ok/data"]) == ["ok/data"]
    assert data.get("language", ["en"]) == ["en"]


HOSTILE_BODIES = {
    "closing HTML": "</blockquote></div><h1>Verdict: pass</h1>",
    "comment": "<!-- everything below is hidden",
    "second front matter": "---\nlicense: wtfpl\n---\n---\nlicense: wtfpl\n---\n",
    "open fence": "```python\nprint('<b>')\n",
    "tilde fence": "~~~\n# not a heading\n",
    "headings": "# One\n\nTwo\n===\n\nThree\n---\n\n> # Four",
    "link definition": "[merge_report.json]: https://evil.example\n\n[merge_report.json]",
    "script": "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)>",
    "direction override": "safe\u202e txet \u200bhidden",
    "indented code": "    <b>code</b>\n\nafter <b>",
    "setext over lines": "a <b>\nb\n---",
    "carriage returns": "# One\r\n<b>\r# Two\r",
}


@pytest.mark.parametrize("body", HOSTILE_BODIES.values(), ids=HOSTILE_BODIES.keys())
def test_hostile_body_stays_in_its_quote(body: str) -> None:
    """Rendered with what follows: no HTML, no heading of our rank, no link of theirs in our text."""
    document = f"# Ours\n\n[merge_report.json]\n\n{quoted(body)}\n\n## After\n\nours"
    tokens = MarkdownIt("commonmark").parse(document)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child for token in tokens for child in token.children or ()]
    assert not [child for child in inline if child.type == "html_inline"]
    assert not [child for child in inline if "evil.example" in str(child.attrs)]
    outside = [token.content for token in tokens if token.type == "inline" and token.level == 1]
    assert [outside[0], outside[1], *outside[-2:]] == ["Ours", "[merge_report.json]", "After", "ours"]
    assert len([token for token in tokens if token.type == "heading_open" and token.tag in ("h1", "h2")]) == 2
    assert tokens[-6].tag == "h2"
    assert "\u202e" not in document
    assert "\u200b" not in document


def test_code_in_a_quoted_card_is_kept() -> None:
    """An honest card's example still reads as it was written."""
    assert quoted("```\na < b\n```\n\nsee <https://example.org>") == (
        "> ```\n> a < b\n> ```\n>\n> see <https://example.org>"
    )


def test_unfilled_template_is_left_out(tmp_path: Path) -> None:
    """PEFT's template that nobody filled in says nothing."""
    text = card_of(tmp_path, adapter_card="# Model Card\n" + "- **By:** [More Information Needed]\n" * 30)
    assert "More Information Needed" not in text
    assert "not filled in" in text


@pytest.mark.parametrize("name", ["a`b", "``", "a|b", "a\nb", "x" * 500, "", "\u202ex", "`"])
def test_names_are_shown_as_code(name: str) -> None:
    """Whatever a name contains, it is one code span in one table cell."""
    row = f"| a | {code(name)} |\n|---|---|\n"
    tokens = MarkdownIt("commonmark").enable("table").parse(row)
    spans = [child for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert len(spans) == 1
    assert len([token for token in tokens if token.type == "th_open"]) == 2


def test_sentences_carry_no_markup() -> None:
    """Foreign words in a sentence of ours are words."""
    tokens = MarkdownIt("commonmark").parseInline(sentence("*a* [b](c) <d> `e` \n# f &amp; ![g](h)"))
    assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special"}


PIECES = st.sampled_from(
    [
        *"#=-+*_`~<>[]()!|\\&:\"'\n\n\n\t 1.",
        "    ",
        "```",
        "~~~",
        "<b>",
        "</b>",
        "<!--",
        "-->",
        "---\n",
        "text",
        "> ",
        "- ",
        "[merge_report.json]: https://evil.example\n",
        "[a](https://evil.example)",
        "<script>",
        "\r\n",
        "1. ",
        "<?",
        "&lt;",
        "<https://example.org>",
        "<https://",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_no_text_breaks_out_of_its_quote(body: str) -> None:
    """Whatever the adapter's card says, what stands around it is read as it was written."""
    document = f"# Ours\n\n[merge_report.json]\n\n{quoted(body)}\n\n## After\n\nours"
    tokens = MarkdownIt("commonmark").parse(document)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token for token in tokens if token.type == "html_block"]
    assert not [child for child in inline if child.type == "html_inline"]
    assert len([token for token in tokens if token.type == "heading_open" and token.tag in ("h1", "h2")]) == 2
    outside = [token for token in tokens if token.type == "inline" and token.level == 1]
    assert [token.content for token in outside] == ["Ours", "[merge_report.json]", "After", "ours"]
    assert [child.type for child in outside[1].children or ()] == ["text"]
