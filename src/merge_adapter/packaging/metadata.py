"""The metadata block of the merged model's card, from the cards and configs of its sources."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from merge_adapter.errors import PolicyError
from merge_adapter.licences import Licence, LicenceDecision, decide_licence, read_licence
from merge_adapter.packaging.sentence import is_sentence_transformer
from merge_adapter.types import Repository, Resolved

README = "README.md"
_CARD_LIMIT = 2 << 20
"""Bytes of a card read at most."""
_BLOCK_LIMIT = 64 << 10
"""Characters of a metadata block read at most."""
_FRONT_MATTER = re.compile(
    r"\s*---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
_REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LICENSE_NAME = re.compile(r"[a-z0-9.-]{1,128}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
_TAG = re.compile(r"[\w][\w .+/-]{0,63}")
_LINK = re.compile(r"https://[^\s<>\"']{1,300}|[\w][\w./-]{0,100}")
_LISTED = 50
"""Entries of one list taken from a card."""
_ADAPTER_TAGS = re.compile(r"(?:.*:.*|peft|lora|adapter|qlora|dora|merge-adapter)", re.IGNORECASE)
"""Tags that are no longer true of a merged model, or that the Hub makes itself (`base_model:adapter:…`)."""
_PIPELINES = frozenset(
    (
        "any-to-any",
        "audio-classification",
        "audio-text-to-text",
        "automatic-speech-recognition",
        "feature-extraction",
        "fill-mask",
        "image-classification",
        "image-segmentation",
        "image-text-to-text",
        "image-to-text",
        "object-detection",
        "question-answering",
        "sentence-similarity",
        "summarization",
        "text-classification",
        "text-generation",
        "text-ranking",
        "text-to-speech",
        "text2text-generation",
        "token-classification",
        "translation",
        "video-text-to-text",
        "visual-question-answering",
        "zero-shot-classification",
    )
)
_PIPELINE_OF_CLASS = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("ForCTC", "automatic-speech-recognition"),
    ("ForImageClassification", "image-classification"),
    ("ForAudioClassification", "audio-classification"),
)


@dataclass(frozen=True)
class Card:
    """A source's README.md: its metadata, as parsed and untrusted, and its whole text."""

    metadata: Mapping[str, Any]
    text: str

    @property
    def licence(self) -> Licence:
        """The licence it states; none where that has no form the Hub takes."""
        stated = read_licence(self.metadata)
        if not all(_LICENSE.fullmatch(part) for part in stated.id.split(" and ")):
            return Licence("")
        name = stated.name if _LICENSE_NAME.fullmatch(stated.name) else ""
        return Licence(stated.id, name, stated.link if _LINK.fullmatch(stated.link) else "")

    @property
    def datasets(self) -> list[str]:
        """The ids of the data sets it names, each once; what is no id is passed over."""
        return _matching(_REPO_ID, _listed(self.metadata.get("datasets")))


def read_card(repository: Repository) -> Card:
    """The card of a source. One that is missing, too large or unreadable counts as empty: nobody needs it."""
    if repository.files.get(README, _CARD_LIMIT + 1) > _CARD_LIMIT:
        return Card({}, "")
    text = repository.read(README).decode("utf-8", errors="replace")
    match = _FRONT_MATTER.match(text)
    if match is None or len(match.group(1)) > _BLOCK_LIMIT:
        return Card({}, text)
    try:
        parsed = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = None
    return Card(parsed if isinstance(parsed, dict) else {}, text)


def named_datasets(sources: Resolved) -> tuple[str, ...]:
    """The ids under `datasets` of the adapters' cards, each once, in their order."""
    return tuple(
        dict.fromkeys(name for one in sources.adapters for name in read_card(one.repository).datasets)
    )


def merged_licence(base: Card, adapter: Card, chosen: str | None) -> LicenceDecision:
    """What the merged card says. Licences that conflict are both named: only publishing is refused for that."""
    try:
        return decide_licence(adapter.licence, base.licence, given=chosen)
    except PolicyError as error:
        name = re.sub(r"[^a-z0-9.-]", "-", f"{base.licence.id}-and-{adapter.licence.id}")
        return LicenceDecision(Licence("other", name), f"Not settled: {error.message}.")


def metadata(
    sources: Resolved, config: Mapping[str, Any], base: Card, adapter: Card, terms: Licence
) -> dict[str, Any]:
    """The metadata as the Hub validates it; absent what is not known. `config` is the merged config.json."""
    sentence = is_sentence_transformer(sources)
    base_id = sources.base.repository.origin.repo_id
    fields: dict[str, Any] = {
        "license": _single(terms.id.split(" and ")),
        "license_name": terms.name,
        "license_link": terms.link,
        "language": _values(_LANGUAGE, adapter, base, "language"),
        "library_name": "sentence-transformers" if sentence else "transformers",
        "pipeline_tag": _pipeline(config, adapter, base),
        "base_model": [base_id] if base_id else [],
        "base_model_relation": "finetune" if base_id else "",
        "datasets": adapter.datasets,
        "tags": _tags(adapter, base, sentence=sentence),
    }
    return {name: value for name, value in fields.items() if value}


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML block with its fences and a final newline."""
    body = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{body}---\n"


def _tags(adapter: Card, base: Card, *, sentence: bool) -> list[str]:
    found = [tag for tag in _values(_TAG, adapter, base, "tags") if not _ADAPTER_TAGS.fullmatch(tag)]
    if sentence and "sentence-transformers" not in found:
        found.insert(0, "sentence-transformers")
    return [*found, "merge-adapter"]


def _pipeline(config: Mapping[str, Any], adapter: Card, base: Card) -> str:
    """What the architecture does; for one whose name does not tell, what the cards say."""
    classes = _listed(config.get("architectures"))
    for ending, task in _PIPELINE_OF_CLASS:
        if any(name.endswith(ending) for name in classes):
            return task
    for card in (adapter, base):
        stated = card.metadata.get("pipeline_tag")
        if isinstance(stated, str) and stated in _PIPELINES:
            return stated
    return ""


def _values(pattern: re.Pattern[str], adapter: Card, base: Card, key: str) -> list[str]:
    """The adapter's values of that key, else the base's."""
    return _matching(pattern, _listed(adapter.metadata.get(key))) or _matching(
        pattern, _listed(base.metadata.get(key))
    )


def _single(values: list[str]) -> str | list[str]:
    """The one value itself, or the list of several."""
    return values[0] if len(values) == 1 else values


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values[:_LISTED] if isinstance(one, str)]


def _matching(pattern: re.Pattern[str], values: Iterable[Any]) -> list[str]:
    found: dict[str, None] = {}
    for value in values:
        if isinstance(value, str) and pattern.fullmatch(value):
            found[value] = None
    return list(found)
