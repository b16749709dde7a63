"""A merge under the gate without its outputs part: files, weights, modules, mutants, tokenizer and configs.

The command line has no such switch, as its verdict would be inconclusive at best; the cost is worth knowing.
"""

import sys
from pathlib import Path

from merge_adapter.collecting import seldom_collected
from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent
from merge_adapter.verify.settings import VerifySettings

adapter, output = sys.argv[1:]
request = MergeRequest(SourceRequest((adapter,)), gate=VerifySettings(outputs=False, greedy_tokens=0))
with seldom_collected():  # as the command line has it
    merged = merge_to_folder(request, Path(output), hub=Hub(), progress=Silent())
print(merged.verification.verdict.value, *merged.verification.reasons, sep="\n")
sys.exit(merged.verification.verdict.value == "fail")
