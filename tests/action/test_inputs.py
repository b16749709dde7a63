"""Inputs: read from INPUT_* alone, each checked, with a message that says what would have been right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_adapter.action.inputs import (
    NAMES,
    OPTIONS_ARE_INPUTS,
    SECRETS,
    Inputs,
    hint_here,
    read_inputs,
    take_secrets,
)
from merge_adapter.errors import InputError
from merge_adapter.types import (
    Combination,
    CombinationType,
    DType,
    MajoritySign,
    OnFail,
    PublishTo,
    QuantizedBase,
    SoftPrompt,
    Strategy,
)


def env(**given: str) -> dict[str, str]:
    """As the runner passes them: upper case, hyphens kept."""
    return {f"INPUT_{name.replace('_', '-').upper()}": value for name, value in given.items()}


def test_the_defaults_of_action_yml_are_the_defaults_of_the_code(definition: dict[str, Any]) -> None:
    """A step that gives nothing and one that spells every default out do the same."""
    spelled = env(**{name: str(entry.get("default", "")) for name, entry in definition["inputs"].items()})
    assert read_inputs(spelled) == read_inputs({}) == Inputs()


def test_action_yml_declares_what_the_code_reads(definition: dict[str, Any]) -> None:
    assert tuple(definition["inputs"]) == NAMES
    assert set(SECRETS) < set(NAMES)


def test_every_input_is_understood() -> None:
    inputs = read_inputs(
        env(
            adapter="acme/one@main\n ./adapters/two , acme/three\n",
            base_model="acme/base",
            base_revision="v1",
            subfolder="checkpoint-10",
            path="adapters",
            publish="NEW-REPO",
            target_repo="acme/{name}-merged",
            path_in_repo="merged",
            private="True",
            on_fail="discard",
            license="apache-2.0",
            allow_base="acme/*\nmeta-llama/Llama-3.2-1B",
            dtype="bfloat16",
            device="cuda:1",
            strategy="stream",
            quantized_base="original",
            trust_remote_code="true",
            probe_tokens="64",
            probes="probes.txt",
            dataset_probes="false",
            disk_budget="12GB",
            output="merged",
        )
    )
    assert inputs == Inputs(
        adapters=("acme/one@main", "./adapters/two", "acme/three"),
        base_model="acme/base",
        base_revision="v1",
        subfolder="checkpoint-10",
        path="adapters",
        publish=PublishTo.NEW_REPO,
        target_repo="acme/{name}-merged",
        path_in_repo="merged",
        private=True,
        on_fail=OnFail.DISCARD,
        license="apache-2.0",
        allow_base=("acme/*", "meta-llama/Llama-3.2-1B"),
        dtype=DType.BFLOAT16,
        device="cuda:1",
        strategy=Strategy.STREAM,
        quantized_base=QuantizedBase.ORIGINAL,
        trust_remote_code=True,
        probe_tokens=64,
        probes=Path("probes.txt"),
        dataset_probes=False,
        disk_budget=12_000_000_000,
        output=Path("merged"),
    )


def test_adapters_to_combine_have_weights_and_a_way() -> None:
    given = env(
        adapter="acme/one",
        combine_with="acme/two@v1\nacme/three",
        weights="0.5\n-1\n2e-1",
        combination="ties_svd",
        density="0.4",
        majority_sign="frequency",
        svd_rank="16",
        seed="7",
        soft_prompt="tokens",
    )
    inputs = read_inputs(given)
    assert (inputs.adapters, inputs.combine_with) == (("acme/one",), ("acme/two@v1", "acme/three"))
    assert inputs.weights == (0.5, -1.0, 0.2) and inputs.soft_prompt is SoftPrompt.TOKENS
    assert inputs.combination == Combination(CombinationType.TIES_SVD, 0.4, MajoritySign.FREQUENCY, 16, 7)


def test_names_with_underscores_serve_where_a_shell_stands_between() -> None:
    assert read_inputs({"INPUT_BASE_MODEL": "acme/base"}).base_model == "acme/base"
    with pytest.raises(InputError, match="set twice"):
        read_inputs({"INPUT_BASE_MODEL": "acme/base", "INPUT_BASE-MODEL": "acme/other"})


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6e9), ("500 MiB", 500 << 20), ("1.5tb", 1.5e12), ("1000", 1000), ("2k", 2000)]
)
def test_sizes(text: str, size: float) -> None:
    assert read_inputs(env(disk_budget=text)).disk_budget == int(size)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"publish": "yes"}, "publish is 'yes', expected one of: pull-request, new-repo, none"),
        ({"on_fail": "ignore"}, "expected one of: draft, discard"),
        ({"dtype": "fp16"}, "expected one of: auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "expected auto, cpu, cuda or cuda:N"),
        ({"private": "yes"}, "private is 'yes', expected true or false"),
        ({"verify": "0"}, "verify is '0', expected true or false"),
        ({"probe_tokens": "2"}, "whole number of at least 16"),
        ({"probe_tokens": "-16"}, "whole number"),
        ({"disk_budget": "big"}, "a size such as 6GB"),
        ({"allow_base": "*"}, "expected OWNER/\\* or OWNER/NAME"),
        ({"adapter": "a/b", "watch": "acme"}, "exclude each other"),
        ({"verify": "false", "probe_tokens": "32"}, "verify is false"),
        ({"verify": "false", "on_fail": "discard"}, "nothing would ever be published"),
        ({"publish": "none", "target_repo": "a/b"}, "publish is none"),
        ({"base_revision": "v1", "watch": "acme"}, "does not fit watch"),
        ({"combine_with": "a/b", "watch": "acme"}, "several others are named"),
        ({"adapter": "a/b, a/c", "combine_with": "a/d"}, "several others are named"),
        ({"adapter": "a/b", "combine_with": "a/c", "weights": "1"}, "has 1 numbers, expected 2"),
        ({"weights": "a lot"}, "weights is 'a lot', expected a number"),
        ({"density": "nan"}, "density is 'nan', expected a number"),
        ({"combination": "sum"}, "expected one of: sequential, "),
        ({"svd_rank": "-4"}, "expected a whole number"),
        ({"seed": "9" * 5000}, "expected a whole number"),
        ({"soft_prompt": "yes"}, "expected one of: refuse, tokens"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_inputs(env(**given))


def test_a_name_that_is_no_input_is_refused_with_the_one_that_was_meant() -> None:
    """A misspelt `private` must not make a public repository."""
    with pytest.raises(InputError, match="no input 'privat'") as caught:
        read_inputs({"INPUT_PRIVAT": "true"})
    assert "Did you mean private?" in caught.value.hint


def test_tokens_leave_the_environment_and_are_never_shown() -> None:
    """No child process inherits them, and no representation holds them."""
    environment = env(hf_token=" hf_x ", github_token="ghs_y") | {"PATH": "/bin"}
    assert "hf_x" not in repr(read_inputs(environment))
    secrets = take_secrets(environment)
    assert (secrets.hf_token, secrets.github_token) == ("hf_x", "ghs_y")
    assert environment == {"PATH": "/bin"}
    assert "hf_x" not in repr(secrets)


def test_an_event_can_set_inputs_in_place_of_the_workflow() -> None:
    inputs = read_inputs(env(dtype="auto", base_model="acme/base"), instead=[("dtype", "float32")])
    assert (inputs.dtype, inputs.base_model) == (DType.FLOAT32, "acme/base")


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("Give --license ID.", True),
        ("Leave out `device`, or use `options: --gpus all`.", False),
        ("Run: hf auth login", False),
    ],
)
def test_hints_explain_options_where_they_are_inputs(hint: str, told: bool) -> None:
    """And no other program's."""
    assert (OPTIONS_ARE_INPUTS in hint_here(hint)) == told
