"""The lines of Python that load the merged model, for its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_adapter.packaging.tokenizer import CONFIG as TOKENIZER_CONFIG
from merge_adapter.packaging.tokenizer import TEMPLATE

_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_COMPLETION = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_SEQ2SEQ = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = AutoModelForSeq2SeqLM.from_pretrained({place}, dtype="auto")
inputs = tokenizer("Text to work on", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_CLASSIFIER = """\
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = {auto}.from_pretrained({place}, dtype="auto")
logits = model(**tokenizer("Text to judge", return_tensors="pt")).logits
print([model.config.id2label[int(index)] for index in logits.argmax(-1).flatten()])
"""
_QUESTION = """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = AutoModelForQuestionAnswering.from_pretrained({place}, dtype="auto")
inputs = tokenizer("Who wrote it?", "It was written by Ada.", return_tensors="pt")
answer = model(**inputs)
span = inputs["input_ids"][0, answer.start_logits.argmax() : answer.end_logits.argmax() + 1]
print(tokenizer.decode(span))
"""
_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({place})
embeddings = model.encode(["A first sentence.", "Another one."])
print(model.similarity(embeddings, embeddings))
"""
_PAIRS = """\
from sentence_transformers import CrossEncoder

model = CrossEncoder({place})
print(model.predict([("A question", "A passage that may answer it.")]))
"""
_PLAIN = """\
from transformers import {auto}

model = {auto}.from_pretrained({place}, dtype="auto")
"""
_DOWNLOAD = """\
from huggingface_hub import snapshot_download

folder = snapshot_download("{place}", allow_patterns={files}) + {below}

"""
"""transformers takes a subfolder, but where PEFT is installed it looks for an adapter at the root all the same, and
loads that one's base model; sentence-transformers takes none."""
_AUTO_CLASSES = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification", _CLASSIFIER),
    ("ForTokenClassification", "AutoModelForTokenClassification", _CLASSIFIER),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", _QUESTION),
    ("ForMaskedLM", "AutoModelForMaskedLM", _PLAIN),
    ("ForSpeechSeq2Seq", "AutoModelForSpeechSeq2Seq", _PLAIN),
    ("ForImageClassification", "AutoModelForImageClassification", _PLAIN),
    ("ForAudioClassification", "AutoModelForAudioClassification", _PLAIN),
    ("ForCTC", "AutoModelForCTC", _PLAIN),
)


def snippet(
    folder: Path, config: Mapping[str, Any], *, place: str, subfolder: str = "", code_needed: bool
) -> str:
    """Python that loads the model in `folder` from `place` (a Hub id or a path) and uses it once.

    `subfolder`: where in that repository the model lies. `code_needed`: the model runs code of its
    repository, and loading it has to say so.
    """
    template, auto = _choose(folder, config)
    name, opening = f'"{place}"', ""
    if subfolder:
        files, below = json.dumps(f"{subfolder}/*"), json.dumps(f"/{subfolder}")
        name, opening = "folder", _DOWNLOAD.format(place=place, files=files, below=below)
    if code_needed:
        name += ", trust_remote_code=True"
    return opening + template.format(place=name, auto=auto)


def _choose(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """The template and the auto class."""
    architectures = config.get("architectures")
    classes = (
        [one for one in architectures if isinstance(one, str)] if isinstance(architectures, list) else []
    )
    if (folder / "modules.json").is_file() or "sentence_transformers" in config:
        pairs = any(one.endswith("ForSequenceClassification") for one in classes)
        return (_PAIRS if pairs else _SENTENCES), ""
    for ending, auto, template in _AUTO_CLASSES:
        if any(one.endswith(ending) for one in classes):
            return template, auto
    if config.get("is_encoder_decoder") and any(one.endswith("ForConditionalGeneration") for one in classes):
        return _SEQ2SEQ, ""
    if any(one.endswith("ForConditionalGeneration") for one in classes):
        return _PLAIN, "AutoModelForImageTextToText"
    if any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in classes):
        return (_CHAT if _has_chat_template(folder) else _COMPLETION), ""
    return _PLAIN, "AutoModel"


def _has_chat_template(folder: Path) -> bool:
    config = folder / TOKENIZER_CONFIG
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return inside or (folder / TEMPLATE).is_file()
