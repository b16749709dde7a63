"""What the Hub demands of a card's metadata, and what it only warns about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from localhub.card import RELATIONS, card_block, card_metadata

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
_REPO_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*|code|multilingual", re.ASCII)
_MAX_TAG = 100


@dataclass
class CardReport:
    """What is wrong with a card; only errors refuse it."""

    errors: list[str]
    warnings: list[str]


def check_card(readme: str, repo_type: str) -> CardReport:
    """Judge the metadata of a README."""
    report = CardReport([], [])
    block = card_block(readme)
    if block is None:
        report.warnings.append(
            "empty or missing yaml metadata in repo card "
            "(https://huggingface.co/docs/hub/model-cards#model-card-metadata)"
        )
        return report
    try:
        loaded = yaml.safe_load(block)
    except yaml.YAMLError as error:
        report.errors.append("Invalid YAML in the metadata block: " + " ".join(str(error).split()))
        return report
    if loaded is None:
        report.warnings.append("empty or missing yaml metadata in repo card")
        return report
    if not isinstance(loaded, dict):
        report.errors.append("The metadata block must be a YAML mapping")
        return report
    metadata = card_metadata(readme)
    _check_license(metadata, report)
    _check_strings(metadata, report)
    _check_languages(metadata, report)
    if repo_type == "model":
        _check_base_models(metadata, report)
    if repo_type == "space" and not isinstance(metadata.get("sdk"), str):
        report.errors.append('"sdk" is required')
    return report


def _check_license(metadata: dict[str, Any], report: CardReport) -> None:
    value = metadata.get("license")
    if value is None:
        return
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or name not in LICENSES:
            report.errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}], got {name!r}')
    if value == "other" and "license_name" not in metadata:
        report.warnings.append('"license_name" is missing: "license: other" should name the license')
    name = metadata.get("license_name")
    if name is not None and not re.fullmatch(r"[a-z0-9-.]+", str(name)):
        report.errors.append('"license_name" must match /^[a-z0-9-.]+$/')


def _check_strings(metadata: dict[str, Any], report: CardReport) -> None:
    for key in ("library_name", "pipeline_tag", "license_link"):
        if key in metadata and not isinstance(metadata[key], str):
            report.errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics"):
        value = metadata.get(key)
        if value is None or (isinstance(value, str) and key != "tags"):
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            report.errors.append(f'"{key}" must be an array of strings')
        elif any(len(item) > _MAX_TAG for item in value):
            report.errors.append(f'"{key}": an item has more than {_MAX_TAG} characters')
    index = metadata.get("model-index")
    if index is not None and not (isinstance(index, list) and all(isinstance(i, dict) for i in index)):
        report.errors.append('"model-index" must be an array of objects')


def _check_languages(metadata: dict[str, Any], report: CardReport) -> None:
    value = metadata.get("language")
    if value is None:
        return
    for language in value if isinstance(value, list) else [value]:
        # YAML reads an unquoted `no` (Norwegian) as false.
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            report.errors.append(
                f'"language" must only contain ISO 639-1, 639-2 or 639-3 codes, or "code", got {language!r}'
            )


def _check_base_models(metadata: dict[str, Any], report: CardReport) -> None:
    value = metadata.get("base_model")
    bases = value if isinstance(value, list) else [] if value is None else [value]
    for base in bases:
        if not isinstance(base, str) or not _REPO_ID.fullmatch(base):
            report.errors.append(f'"base_model" must be a model id (owner/name), got {base!r}')
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        report.errors.append(
            f'"base_model_relation" must be one of [{", ".join(RELATIONS)}], got {relation!r}'
        )
    new = metadata.get("new_version")
    if new is not None and (not isinstance(new, str) or not _REPO_ID.fullmatch(new)):
        report.errors.append('"new_version" must be a model id (owner/name)')
