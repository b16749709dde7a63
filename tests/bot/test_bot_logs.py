"""The bot's log: JSON lines and nothing else, whoever writes them, and no secret in them."""

from __future__ import annotations

import json
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_adapter.bot.logs import log, logging_to


def test_a_log_without_room_ends_no_thread() -> None:
    """What logs that something failed must be able to go on, or the bot stands still for want of a line."""
    with logging_to("/dev/full"):
        log("slot-failed", error="the disk is full")


def test_every_line_of_the_log_is_json(settings: Any, bot_process: Any, tmp_path: Path) -> None:
    """Also what libraries say, here of a request that is none, and in a file where the settings name one."""
    written = tmp_path / "lines"
    process, url = bot_process(replace(settings, log_file=str(written)))
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stranger:
        stranger.sendall(b"no HTTP at all\r\n\r\n")
        assert b"400" in stranger.recv(1000)
    process.terminate()
    process.wait(60)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert lines[0]["event"] == "serving" and lines[-1]["event"] == "stopped"
    (warning,) = (line for line in lines if line["event"] == "library")
    assert warning["level"] == "warning" and "Invalid HTTP request" in warning["text"]
    assert (tmp_path / "bot.log").read_text() == ""


def test_what_libraries_log_is_no_place_for_tokens(tmp_path: Path) -> None:
    """An exception is logged with its traceback, in one line and without what looks like a token."""
    written = tmp_path / "lines"
    with logging_to(str(written)):
        try:
            raise ValueError("hf_" + "a" * 34)
        except ValueError:
            logging.getLogger("some.library").exception("it failed\nin two lines")
        logging.getLogger("huggingface_hub.file_download").warning("Retrying")
        logging.getLogger("some.library").info("not worth a line")
    logging.getLogger("some.library").warning("after the bot")
    first, second = (json.loads(line) for line in written.read_text().splitlines())
    assert "Traceback" in first["text"] and "hf_aaa" not in first["text"]
    assert (second["logger"], second["text"]) == ("huggingface_hub.file_download", "Retrying")
