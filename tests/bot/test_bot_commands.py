"""Commands in comments and choices in forms."""

from __future__ import annotations

import pytest

from merge_adapter.bot import choices
from merge_adapter.bot.commands import find_command
from merge_adapter.bot.jobs import JobKind, JobOptions
from merge_adapter.errors import InputError
from merge_adapter.types import CombinationType, DType, QuantizedBase, SoftPrompt, Strategy


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("@bot merge", JobOptions()),
        ("Please, @bot merge --dtype bfloat16", JobOptions(dtype=DType.BFLOAT16)),
        ("@Bot: merge --base-model=meta/x --strategy memory", JobOptions("meta/x", strategy=Strategy.MEMORY)),
        (
            "- thanks\n```\ncode\n```\n> quoted\n@bot merge --target-repo ada/y --private true\nbye",
            JobOptions(target_repo="ada/y", private=True),
        ),
        (
            "@bot merge --adapter ada/two@v1 --adapter ada/three --weight 1 --weight -0.5 --weight=2",
            JobOptions(adapters=("ada/two@v1", "ada/three"), weights=(1.0, -0.5, 2.0)),
        ),
        (
            "@bot merge --adapter ada/two --combination ties_svd --density 0.4 --svd-rank 8",
            JobOptions(adapters=("ada/two",), combination=CombinationType.TIES_SVD, density=0.4, svd_rank=8),
        ),
        (
            "@bot merge --quantized-base original --soft-prompt tokens",
            JobOptions(quantized_base=QuantizedBase.ORIGINAL, soft_prompt=SoftPrompt.TOKENS),
        ),
    ],
)
def test_a_command_is_understood(text: str, options: JobOptions) -> None:
    command = find_command(text, "bot")
    assert command is not None and (command.kind, command.options) == (JobKind.MERGE, options)


@pytest.mark.parametrize(
    "text",
    [
        "the @bot merges adapters",
        "mail me@bot merge",
        "> @bot merge",
        "```\n@bot merge\n```",
        "````\n```\n@bot merge\n```\n````",
        "~~~\n```\n@bot merge\n~~~",
        "like this:\r\n\r\n    @bot merge\r\n",
        "- in a list\n\n  ```\n  @bot merge\n  ```",
        "<!--\nReplace this:\n@bot merge\n-->",
        "never closed\n```\n@bot merge",
        "`@bot merge`",
        "@bot-two merge",
        "@bot",
        "@bot please merge",
        "@BOTTOM merge",
    ],
)
def test_talk_is_no_command(text: str) -> None:
    assert find_command(text, "bot") is None


def test_verify_names_a_checkpoint() -> None:
    command = find_command("@bot verify ada/style-merged@refs/pr/1", "bot")
    assert command is not None
    assert (command.kind, command.options.merged) == (JobKind.VERIFY, "ada/style-merged@refs/pr/1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@bot merge now", "takes no 'now'"),
        ("@bot merge --trust-remote-code yes", "no option --trust-remote-code"),
        ("@bot merge --output /etc", "no option --output"),
        ("@bot merge --adapters a/b", "no option --adapters"),
        ("@bot merge --base_model a/b", "no option --base_model"),
        ("@bot merge --dtype int4", "expected one of"),
        ("@bot merge --adapter /etc/passwd", "not a Hub id"),
        ("@bot merge --adapter ada/x --weight a", "a weight is 'a', expected a number"),
        ("@bot merge --weight inf", "expected a number"),
        ("@bot merge --density 1.5", "between 0 and 1"),
        ("@bot merge --svd-rank x", "whole number"),
        ("@bot merge --svd-rank 0", "whole number of at least 1"),
        ("@bot merge --svd-rank 65537", "whole number"),
        ("@bot merge --svd-rank 0000000012345678901", "whole number"),
        ("@bot merge " + "--adapter a/b " * 9, "8 at most"),
        ("@bot verify ada/x --soft-prompt tokens", "verify has no option soft-prompt"),
        ("@bot merge --dtype", "no value"),
        ("@bot merge --base-model ../../etc", "not a Hub id"),
        ("@bot merge --base-model /etc/passwd", "not a Hub id"),
        ("@bot merge --target-repo ada", "not a Hub id"),
        ("@bot merge --subfolder ../x", "not a folder"),
        ("@bot merge --license 'a b'", "not a licence"),
        ("@bot merge --base-revision=--help", "no value"),
        ("@bot merge --private maybe", "expected true or false"),
        ("@bot merge 'unfinished", "cannot be read"),
        ("@bot verify", "takes the merged checkpoint"),
        ("@bot verify a/b --license mit", "no option"),
        ("@bot verify ./folder", "not a Hub id"),
    ],
)
def test_a_bad_command_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_command(text, "bot")


@pytest.mark.parametrize(
    "text", ["--json", "-h", "a/b/c", "a//b", "a/..", "é/b", "a/b\nc", "", "a/b@--x", "a/b@"]
)
def test_nothing_that_looks_like_an_option_or_a_path_is_a_reference(text: str) -> None:
    with pytest.raises(InputError):
        choices.reference(text, what="adapter")


@pytest.mark.parametrize(
    "options",
    [
        JobOptions(),
        JobOptions("a/b", dtype=DType.BFLOAT16, private=False, merged="a/c"),
        JobOptions(
            adapters=("ada/two@v1",),
            weights=(1.0, -0.5),
            combination=CombinationType.TIES,
            density=0.4,
            svd_rank=8,
            quantized_base=QuantizedBase.DEQUANTIZE,
            soft_prompt=SoftPrompt.TOKENS,
        ),
    ],
)
def test_options_come_back_from_the_store_as_they_were(options: JobOptions) -> None:
    assert JobOptions.from_json(options.to_json()) == options
