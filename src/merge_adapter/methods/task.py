"""What an adapter was trained to do: by its task type or, where it states none, by the class of model PEFT recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HEADED = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Task type -> how the names of its classes end."""
_HEAD = re.compile(r"For(?:[A-Z]\w*(?:Classification|Segmentation)|QuestionAnswering)")


def trained_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that the adapter was trained on; "" unless PEFT recorded it, for want of a task."""
    recorded = config.get("auto_mapping")
    if not isinstance(recorded, Mapping) or not str(recorded.get("parent_library")).startswith(
        "transformers."
    ):
        return ""
    return str(recorded.get("base_model_class"))


def headed_class(config: Mapping[str, Any]) -> str:
    """The part of a class name that stands for the head which the adapter was trained with; "" for a model without one.

    Heads are what belongs to a task, such as ForImageClassification: PEFT has no task type for pictures and sounds.
    """
    found = _HEAD.search(trained_class(config))
    return _HEADED.get(str(config.get("task_type"))) or (found[0] if found else "")


def is_labelled(config: Mapping[str, Any]) -> bool:
    """Whether that head has one row per label."""
    return headed_class(config).endswith(("Classification", "Segmentation"))
