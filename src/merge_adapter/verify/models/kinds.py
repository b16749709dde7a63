"""What a model answers with: from the adapter's task type, the base's architecture and transformers' own lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from merge_adapter.types import Resolved


class Kind(StrEnum):
    """What a model answers with, and so how two of them are compared."""

    CAUSAL = "causal-lm"
    MASKED = "masked-lm"
    SEQ2SEQ = "seq2seq-lm"
    CLASSIFIER = "classifier"
    TOKENS = "token-classifier"
    SPANS = "question-answering"
    EMBEDDING = "embedding"
    VISION_TEXT = "image-text-to-text"
    IMAGES = "image-classifier"
    AUDIO = "audio-classifier"
    SPEECH = "speech-seq2seq"
    CTC = "speech-ctc"
    OTHER = "other"
    """What a class with another head gives, such as one that segments pictures: all of its numbers."""


AUTO_CLASS = {
    Kind.CAUSAL: "AutoModelForCausalLM",
    Kind.MASKED: "AutoModelForMaskedLM",
    Kind.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Kind.CLASSIFIER: "AutoModelForSequenceClassification",
    Kind.TOKENS: "AutoModelForTokenClassification",
    Kind.SPANS: "AutoModelForQuestionAnswering",
    Kind.EMBEDDING: "AutoModel",
    Kind.VISION_TEXT: "AutoModelForImageTextToText",
    Kind.IMAGES: "AutoModelForImageClassification",
    Kind.AUDIO: "AutoModelForAudioClassification",
    Kind.SPEECH: "AutoModelForSpeechSeq2Seq",
    Kind.CTC: "AutoModelForCTC",
}

_TASKS = {
    "CAUSAL_LM": Kind.CAUSAL,
    "SEQ_2_SEQ_LM": Kind.SEQ2SEQ,
    "SEQ_CLS": Kind.CLASSIFIER,
    "TOKEN_CLS": Kind.TOKENS,
    "QUESTION_ANS": Kind.SPANS,
    "FEATURE_EXTRACTION": Kind.EMBEDDING,
}

HEADED = (Kind.CLASSIFIER, Kind.TOKENS, Kind.SPANS, Kind.IMAGES, Kind.AUDIO, Kind.OTHER)
"""Kinds whose head may have one row per label."""

HEADS = (
    "score", "score.out_proj", "classifier", "classifier.out_proj", "classifier.linear_out", "classifier.linear",
    "classifier.1", "classification_head.out_proj", "logits_proj", "qa_outputs", "cls_classifier", "fc", "head",
    "perceiver.decoder.decoder.final_layer", "decode_head.classifier", "segmentation_head.classifier.convolution",
    "head.head.4", "decoder.head",
    "sequence_summary.summary", "classifier.dense",  # last: hidden layers in other classes that have them
)  # fmt: skip
"""Final layers whose number of rows is the number of labels, over transformers' architectures."""


def kind_of(sources: Resolved) -> Kind:
    """What the adapted model answers with: the adapter's task says it, else its class in training, else the base's."""
    task = sources.adapter.config.get("task_type")
    architecture = trained_on(sources.adapter.config) or _architecture(sources.base.config)
    perceiving = _perceiving(sources, architecture)
    if perceiving is not None:
        return perceiving
    encoder_decoder = bool(sources.base.config.get("is_encoder_decoder"))
    kind = _TASKS.get(task) if isinstance(task, str) else None
    if (
        kind in (None, Kind.CAUSAL)
        and architecture.endswith("ForConditionalGeneration")
        and not encoder_decoder
    ):
        return Kind.VISION_TEXT
    if kind is not None:
        return kind
    for suffix, found in (
        ("ForCausalLM", Kind.CAUSAL),
        ("LMHeadModel", Kind.CAUSAL),
        ("ForMaskedLM", Kind.MASKED),
        ("ForSequenceClassification", Kind.CLASSIFIER),
        ("ForTokenClassification", Kind.TOKENS),
        ("ForQuestionAnswering", Kind.SPANS),
        ("ForConditionalGeneration", Kind.SEQ2SEQ),
    ):
        if architecture.endswith(suffix):
            return found
    listed = _listed(sources.base.config.get("model_type"), architecture)
    return listed or (Kind.OTHER if _has_a_head(architecture) else Kind.EMBEDDING)


def _has_a_head(architecture: str) -> bool:
    """Whether this is a class of transformers for a task, not what AutoModel would load in its place."""
    import transformers

    return re.search(r"For[A-Z]", architecture) is not None and hasattr(transformers, architecture)


def _listed(model_type: object, architecture: str) -> Kind | None:
    """The kind of a class whose name does not tell it (MarianMTModel), by transformers' own lists."""
    from transformers.models.auto import modeling_auto as auto

    for kind, listed in (
        (Kind.CAUSAL, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (Kind.MASKED, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        (Kind.SEQ2SEQ, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        if listed.get(model_type) == architecture:
            return kind
    return None


def _perceiving(sources: Resolved, architecture: str) -> Kind | None:
    """The kind of a model that sees or hears, by transformers' own lists; None for others.

    PEFT has no task types for these: their adapters name none, or one of a text model.
    """
    from transformers.models.auto import modeling_auto as auto

    model_type = sources.base.config.get("model_type")
    head_saved = bool(set(HEADS) & set(sources.adapter.config.get("modules_to_save") or ()))
    for kind, listed in (
        (Kind.IMAGES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        (Kind.SPEECH, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
        (Kind.CTC, auto.MODEL_FOR_CTC_MAPPING_NAMES),
        (Kind.AUDIO, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    ):
        names = listed.get(model_type, ())
        if architecture in ((names,) if isinstance(names, str) else names):
            return kind
        # a bare backbone, and an adapter that carries the head: an image or audio classifier was trained on it
        if names and kind in (Kind.IMAGES, Kind.AUDIO) and head_saved and architecture.endswith("Model"):
            return kind
    return None


def trained_on(config: Mapping[str, Any]) -> str:
    """The class of transformers that PEFT recorded when the adapter was made without a task type; "" for none."""
    recorded = config.get("auto_mapping")
    found = recorded if isinstance(recorded, Mapping) else {}
    return (
        str(found.get("base_model_class"))
        if str(found.get("parent_library")).startswith("transformers.")
        else ""
    )


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""
