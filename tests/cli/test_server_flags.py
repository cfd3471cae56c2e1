"""The flags of a server: every setting has one, and both commands read them alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer.main

from asyncsgl.cli.app import app
from asyncsgl.cli.server_flags import FLAGS, job_of
from asyncsgl.cli.server_job import ServerJob
from asyncsgl.launch_server import job_asked
from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.server.settings import ServerSettings

EVERYTHING = {
    "--model-path": "a-model",
    "--host": "::1",
    "--port": "0",
    "--served-model-name": "small",
    "--log-level": "debug",
    "--incremental-streaming-output": None,
    "--api-key": "k",
    "--admin-api-key": "a",
    "--allow-local-media": "/pictures",
    "--allow-media-domains": "example.org",
    "--tokenizer-path": "a-tokenizer",
    "--dtype": "float16",
    "--device": "cuda",
    "--tp-size": "2",
    "--watchdog-timeout": "60",
    "--page-size": "32",
    "--max-total-tokens": "4096",
    "--mem-fraction-static": "0.5",
    "--chunked-prefill-size": "256",
    "--disable-radix-cache": None,
    "--disable-overlap-schedule": None,
    "--disable-cuda-graph": None,
    "--cuda-graph-max-bs": "8",
    "--no-enable-native": None,
    "--num-threads": "3",
    "--random-seed": "7",
    "--debug-check": None,
    "--max-running-requests": "9",
    "--max-queued-requests": "10",
    "--context-length": "1024",
    "--max-images": "4",
    "--max-image-pixels": "100",
    "--image-memory": "1000",
    "--max-requests": "11",
    "--max-request-body": "12",
    "--max-uploads": "13",
    "--max-media-bytes": "14",
    "--request-timeout": "1.5",
    "--body-timeout": "2.5",
    "--drain-limit": "3.5",
    "--no-batches": None,
    "--batch-folder": "/batches",
    "--batch-concurrency": "15",
    "--profile-folder": "/traces",
}


def words(flags: dict[str, str | None]) -> list[str]:
    return [word for pair in flags.items() for word in pair if word is not None]


def served(arguments: list[str]) -> ServerJob:
    """What `asyncsgl serve` makes of arguments."""
    command: Any = typer.main.get_command(app)
    context = command.commands["serve"].make_context("serve", arguments)
    return job_of(context.params)


def test_both_commands_read_all_flags_alike() -> None:
    job = job_asked(words(EVERYTHING))
    assert job == served(words(EVERYTHING))
    assert len(EVERYTHING) == len(FLAGS)
    changed = job_asked(["--model-path", "m"])
    for part in ("engine", "server"):
        before, after = getattr(changed, part), getattr(job, part)
        assert {name for name in after if before.get(name) == after[name]} == set()
    assert job.engine["cuda_graph_max_bs"] == 8
    assert job.engine["enable_native"] is False
    assert job.server["allow_media_domains"] == ("example.org",)
    assert (job.drain_limit, job.batches) == (3.5, False)


def test_without_flags_both_commands_ask_for_the_same_but_for_the_log() -> None:
    launched = job_asked(["--model-path", "smollm2-135m-instruct"])
    assert launched == dataclasses.replace(served([]), log_level="info")


@pytest.mark.parametrize("kind", [EngineConfig, ServerSettings])
def test_every_setting_has_a_flag_with_its_default(kind: type) -> None:
    job = served([])
    given = {**job.engine, **job.server}
    for field in dataclasses.fields(kind):
        if field.name == "batch_folder":
            continue  # the user's own, unless there is to be none
        if field.name == "max_queued_requests":
            assert given[field.name] < field.default  # a server refuses sooner than a program
            continue
        assert given[field.name] == field.default, field.name


def test_a_tensor_parallel_size_has_sglangs_spellings() -> None:
    for spelling in ("--tp-size", "--tensor-parallel-size", "--tp"):
        assert job_asked(["--model", "m", spelling, "4"]).engine["tp_size"] == 4


def test_keys_may_come_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCSGL_API_KEY", "from-outside")
    for job in (job_asked(["--model", "m"]), served([])):
        assert job.server["api_key"] == "from-outside"
        assert "from-outside" not in repr(job)


def test_a_model_is_needed_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job_asked(["--port", "0"])
    assert "--model-path" in capsys.readouterr().err


def test_folders_are_paths() -> None:
    folder = job_asked(["--model", "m", "--profile-folder", "x"]).server["profile_folder"]
    assert folder == Path("x")
