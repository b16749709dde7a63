"""What surrounds the answers: readable prompts, media made by code, signs of a foreign base, processors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.types import Origin, Verdict
from merge_adapter.verify import VerifySettings, verify
from merge_adapter.verify.findings import Weight
from merge_adapter.verify.probes import shipped
from merge_adapter.verify.probes.beginnings import beginnings, first_sentence
from merge_adapter.verify.probes.media import picture, sound
from merge_adapter.verify.repository.processors import judge_prepared, judge_processors
from merge_adapter.verify.repository.provenance import (
    judge_effect,
    judge_provenance,
    judge_vocabularies,
    untried_domain,
)

SPACELESS = "\u4eca\u65e5\u306f\u3002\u660e\u65e5"
"""Two words of Japanese with a full stop between them."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The harbour was quiet. Two boats lay there.", "The harbour was quiet."),
        ('"A Tuesday." She waited.', '"A Tuesday."'),
        ("Pi is 3.14, they say. Yes.", "Pi is 3.14, they say."),
        ("Packing list: 1. socks, 2. hats. End.", "Packing list: 1. socks, 2. hats."),
        (SPACELESS, SPACELESS[:4]),
        ("def f():\n    return 1.\n", None),
        ("no end", None),
    ],
)
def test_a_prompt_is_a_whole_sentence(text: str, expected: str | None) -> None:
    """Never cut in a word; code and tables give none."""
    assert first_sentence(text) == expected


def test_prompts_are_turns_and_sentences_in_turn(lm_adapter: Path) -> None:
    """With a chat template every other prompt is a user's turn with the template's beginning of an answer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_adapter)
    found = beginnings(shipped(), tokenizer, count=4, vocabulary=2048, limit=200, encoder=False)
    assert found is not None
    assert len(found.shown) == 4
    assert not any("<|" in shown for shown in found.shown)
    assert all(shown[-1] in '.!?"' for shown in found.shown)
    [*_, last] = found.batch.ids[0][found.batch.mask[0].bool()].tolist()
    assert tokenizer.decode([last]) in tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert bool(found.batch.mask[:, -1].all()), "a decoder's prompts end together"


def test_greedy_text_hides_special_tokens(good: Callable[[str], Any]) -> None:
    """What a person reads holds no markers, and padded prompts continue as equal in both arms."""
    result = good("lm-bf16").judge(outputs=True, isolated=False, probe_tokens=128, greedy_tokens=8)
    assert result.verdict is Verdict.PASS, result.reasons
    greedy = result.evidence["greedy"]
    assert greedy["equal"] == greedy["of"] == 4
    assert not any("<|" in row[key] for row in greedy["texts"] for key in ("prompt", "reference", "merged"))


def test_padding_does_not_change_a_continuation(lm_base: Path) -> None:
    """A prompt padded on the left is continued as it is alone."""
    import transformers

    from merge_adapter.verify.outputs.answers import greedy
    from merge_adapter.verify.probes.batch import Batch

    model = transformers.AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.float32).eval()
    ids = torch.arange(20, 28)[None]
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), 1)
    mask = (torch.arange(13) >= 5).long()[None]
    alone = greedy(model, Batch(ids, torch.ones_like(ids)), 6, torch.device("cpu"))[0]
    assert torch.equal(greedy(model, Batch(padded, mask), 6, torch.device("cpu"))[0], alone)


def test_media_are_always_the_same_and_differ_from_each_other() -> None:
    """In range, of the shape asked for."""
    one, again, other = (picture(at, channels=3, height=8, width=12) for at in (1, 1, 2))
    assert one.shape == (3, 8, 12)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)
    assert float(one.abs().max()) <= 1
    assert sound(0, 100).shape == (100,)
    assert not torch.allclose(sound(0, 4000), sound(1, 4000), atol=0.1)


def test_a_card_that_names_another_base_is_pointed_out(good: Callable[[str], Any], tmp_path: Path) -> None:
    """The card counts when the config records a local path."""
    right = good("lm-bf16")
    place = right.sources.adapter.repository.origin.folder
    adapter = Path(shutil.copytree(place, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "/tmp/x/y"
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "README.md").write_text(
        "---\nbase_model: somebody/else\ndatasets: [some/data, 'x](y)']\n---\n"
    )
    sources = right.with_sources(right.merged, adapter=adapter).sources

    class Named:
        """The base's repository, under a name on a Hub."""

        origin = Origin(repo_id="demo/pydoc-llama")

        def __getattr__(self, name: str) -> Any:
            return getattr(sources.base.repository, name)

    named = replace(sources, base=replace(sources.base, repository=Named()))
    assert [str(finding) for finding in judge_provenance(named)] == [
        "base model: the adapter's card names somebody/else as its base, it was judged on demo/pydoc-llama"
    ]
    assert not list(judge_provenance(sources))
    [said] = untried_domain(sources)
    assert "names some/data as training data, which is not downloaded: --probes FILE" in str(said)


def test_oversized_updates_and_foreign_tokenizers_are_pointed_out() -> None:
    """Half the updates larger than their weights; no probe that reads alike."""
    assert list(judge_effect([0.1, 3.0, 2.0]))
    assert not list(judge_effect([0.1, 0.2, 9.0, float("inf")]))
    base = {"special_ids": [0], "encoded": [[0, 5, 6], [0, 7]]}
    assert list(judge_vocabularies({"special_ids": [1], "encoded": [[1, 9], [1, 8]]}, base))
    assert not list(judge_vocabularies({"special_ids": [1], "encoded": [[5, 6, 1], [3]]}, base))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"image_mean": [0.5], "processor_class": "X"}', None),
        ('{"image_mean": [0.4]}', "differs from adapter and base in image_mean"),
        ("[", "cannot be read"),
        (None, "is missing"),
    ],
)
def test_processors_must_prepare_as_before(
    content: str | None, says: str | None, good: Callable[[str], Any], tmp_path: Path
) -> None:
    """Files are compared: another mean is a fault, a file that is not there is pointed out."""
    right = good("lm-bf16")
    base = Path(shutil.copytree(right.sources.base.repository.origin.folder, tmp_path / "base"))
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (tmp_path / "merged").mkdir()
    if content is not None:
        (tmp_path / "merged" / "preprocessor_config.json").write_text(content)
    found = list(judge_processors(tmp_path / "merged", right.with_sources(right.merged, base=base).sources))
    says = says or "was compared as a file"  # none that transformers knows
    assert [says in str(finding) for finding in found] == [True]


VIT = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"resample": 0}, "prepares a picture of 64 x 48 in another way"),
        ({"image_mean": [0.4, 0.4, 0.3]}, "prepares a picture of 64 x 48 in another way"),
        ({"size": {"height": 16, "width": 20}}, "prepares a picture of 64 x 48 in another way"),
        ({"image_processor_type": "NoSuchProcessor"}, "cannot be loaded as an image processor"),
    ],
    ids=["alike", "resampling", "mean", "size", "kind"],
)
def test_pictures_go_through_both_repositories_processors(
    changes: dict[str, Any], says: str | None, good: Callable[[str], Any], tmp_path: Path
) -> None:
    """The merged repository's must make of a picture, to the bit, what the base's makes of it."""
    right = good("lm-bf16")
    base = Path(shutil.copytree(right.sources.base.repository.origin.folder, tmp_path / "base"))
    (base / "preprocessor_config.json").write_text(json.dumps(VIT))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "preprocessor_config.json").write_text(json.dumps({**VIT, **changes}))
    found = list(judge_prepared(tmp_path / "merged", right.with_sources(right.merged, base=base).sources))
    assert [says in str(finding) and finding.weight is Weight.FAULT for finding in found] == [True] * bool(
        says
    )


def test_without_pillow_processors_are_compared_as_files(tmp_path: Path) -> None:
    """A process in which it cannot be imported: no processor, no error."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    program = (
        "import sys; sys.modules['PIL'] = None\n"
        "from pathlib import Path\n"
        "from merge_adapter.verify.probes.pictures import processor_of\n"
        "print(processor_of(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "None"


def test_a_kind_that_cannot_be_asked_leaves_the_answer_open(
    tmp_path: Path, sources_of: Any, silence: Any
) -> None:
    """Two towers that want pictures and text at once: the weights are judged, the outputs said not to be."""
    import peft
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 99}, vision_config={**small, "image_size": 16, "patch_size": 4}
    )
    with silence():
        transformers.CLIPModel(config).save_pretrained(tmp_path / "base")
        model = transformers.CLIPModel.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
    result = verify(
        tmp_path / "merged", sources_of(tmp_path / "adapter", tmp_path / "base"), settings=settings
    )
    assert result.verdict is Verdict.INCONCLUSIVE, result.reasons
    assert result.evidence["weights"]["verdict"] == "pass"
    assert any("outputs were not compared" in reason for reason in result.reasons)
