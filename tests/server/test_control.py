"""Routes that tell of the server and act on it: information, health, aborts, cache, profiles."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import httpx
import pytest

from .conftest import Serve, Served

pytestmark = pytest.mark.anyio

LONG = {"max_new_tokens": 1500, "ignore_eos": True}


async def started(client: httpx.AsyncClient, rid: str) -> httpx.Response:
    """A stream whose first event is there; close it to leave."""
    body = {"text": "Once upon", "sampling_params": LONG, "stream": True, "rid": rid}
    request = client.build_request("POST", "/generate", json=body)
    response = await client.send(request, stream=True)
    assert response.status_code == 200
    return response


async def last_event(response: httpx.Response) -> dict[str, object]:
    """The event before `[DONE]`."""
    lines = [line async for line in response.aiter_lines() if line]
    await response.aclose()
    found: dict[str, object] = json.loads(lines[-2].removeprefix("data: "))
    return found


def test_model_info_names_the_kind_of_model(served: Served) -> None:
    info = served.get("/model_info").json()
    assert (info["model_type"], info["architectures"]) == ("llama", ["LlamaForCausalLM"])


def test_model_info_is_enough_to_render_messages(served: Served) -> None:
    info = served.get("/model_info").json()
    assert info == served.get("/get_model_info").json()
    assert info["served_model_name"] == "tiny"
    assert info["is_generation"] is True
    assert info["chat_template"] == served.engine.tokenizer.chat_template
    assert info["special_tokens"]["eos_token"] == "<|im_end|>"


def test_server_info_tells_settings_and_state(served: Served) -> None:
    info = served.get("/server_info").json()
    assert set(info) == set(served.get("/get_server_info").json())
    assert info["page_size"] == 16
    assert info["max_total_num_tokens"] == 16384
    assert info["incremental_streaming_output"] is False
    assert info["internal_states"][0]["pages_total"] == 1024
    assert "api_key" not in json.dumps(info)


@pytest.mark.parametrize("path", ["/health", "/ready", "/health_generate"])
def test_health_has_no_body(served: Served, path: str) -> None:
    response = served.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_metrics_carry_the_names_of_sglang(served: Served) -> None:
    served.generate()
    lines = served.get("/metrics").text.splitlines()
    found = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    for name in (
        "num_running_reqs",
        "num_queue_reqs",
        "token_usage",
        "cache_hit_rate",
        "gen_throughput",
        "prompt_tokens_total",
        "generation_tokens_total",
        "cached_tokens_total",
        "num_requests_total",
        "num_aborted_requests_total",
        "time_to_first_token_seconds_bucket",
        "e2e_request_latency_seconds_count",
        "prompt_tokens_histogram_bucket",
    ):
        assert f"sglang:{name}" in found
    assert all('model_name="tiny"' in line for line in lines if not line.startswith("#"))


def test_metrics_count_requests_by_how_they_are_answered(serve: Serve) -> None:
    served = serve(served_model_name="m")
    served.generate()
    served.post("/generate", text="x", sampling_params={"max_new_tokens": 3}, stream=True)
    served.post("/generate", text="")
    found = {
        name: float(value)
        for name, value in (
            line.rsplit(" ", 1)
            for line in served.get("/metrics").text.splitlines()
            if not line.startswith("#")
        )
    }
    label = 'model_name="m"'
    for streaming in ("true", "false"):
        assert found[f'sglang:num_requests_total{{is_streaming="{streaming}",{label}}}'] == 1
    assert found[f'sglang:num_refused_requests_total{{{label},status="400"}}'] == 1
    assert found[f"sglang:generation_tokens_total{{{label}}}"] == 11
    for name in ("queue_time", "time_to_first_token", "e2e_request_latency"):
        assert found[f"sglang:{name}_seconds_count{{{label}}}"] == 2
    assert found[f"sglang:inter_token_latency_seconds_count{{{label}}}"] == 2


def test_loads(served: Served) -> None:
    (load,) = served.get("/v1/loads").json()["loads"]
    assert load["num_running_reqs"] == load["num_waiting_reqs"] == 0
    assert load["max_total_num_tokens"] == 16384
    assert set(load) > set(served.get("/v1/loads?include=core").json()["loads"][0])
    assert served.get("/v1/loads?include=speed").status_code == 400
    assert served.get("/v1/loads?dp_rank=1").json()["loads"] == []
    lines = served.get("/v1/loads?format=prometheus").text.splitlines()
    assert 'sglang_num_running_reqs{dp_rank="0"} 0' in lines
    assert "# TYPE sglang_memory_token_capacity gauge" in lines


def test_a_model_that_generates_has_no_embeddings(served: Served) -> None:
    response = served.post("/encode", text="x")
    assert response.status_code == 400
    assert "embedding" in response.json()["message"]


async def test_an_abort_ends_exactly_one_request_with_what_it_has(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        one, ten = await asyncio.gather(started(client, "job-1"), started(client, "job-10"))
        done = await client.post("/abort_request", json={"rid": "job-1"})
        assert (done.status_code, done.content) == (200, b"")
        ended = await last_event(one)
        meta = ended["meta_info"]
        assert isinstance(meta, dict)
        assert meta["finish_reason"]["type"] == "abort"
        assert ended["text"]
        assert (await client.get("/v1/loads")).json()["loads"][0]["num_total_reqs"] == 1
        await client.post("/abort_request", json={"rid": "job-", "prefix": True})
        await last_event(ten)
    await asyncio.to_thread(served.assert_idle)


async def test_an_abort_ends_lists_and_samples_by_their_common_name(served: Served) -> None:
    body = {
        "text": ["Once upon", "The sea"],
        "sampling_params": {**LONG, "n": 2},
        "rid": "many",
    }
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        first = await started(client, "first")
        answer = asyncio.ensure_future(client.post("/generate", json=body))
        while (await client.get("/v1/loads")).json()["loads"][0]["num_total_reqs"] < 5:
            pass
        await client.post("/abort_request", json={"rid": "many"})
        reasons = [each["meta_info"]["finish_reason"] for each in (await answer).json()]
        assert [reason["type"] for reason in reasons] == ["abort"] * 4
        await client.post("/abort_request", json={"abort_all": True})
        await last_event(first)


async def test_unknown_ids_and_empty_ones_are_ignored(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        stream = await started(client, "stays")
        for body in ({"rid": "unknown"}, {"rid": ""}, {}, {"rid": "sta"}):
            assert (await client.post("/abort_request", json=body)).status_code == 200
        again = {"text": "x", "rid": "stays"}
        refused = await client.post("/generate", json=again)
        assert refused.status_code == 400
        assert "in use" in refused.json()["message"]
        await stream.aclose()
    await asyncio.to_thread(served.assert_idle)


async def test_the_cache_is_flushed_when_nothing_runs(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        stream = await started(client, "runs")
        busy = await client.post("/flush_cache")
        assert (busy.status_code, busy.text[:18]) == (400, "Flush cache failed")
        assert (await client.get("/flush_cache?timeout=0.05")).status_code == 400
        waiting = asyncio.ensure_future(client.post("/flush_cache?timeout=30"))
        await stream.aclose()
        flushed = await waiting
        assert (flushed.status_code, flushed.text[:14]) == (200, "Cache flushed.")
    assert served.engine.statistics().pages_cached == 0


def test_a_profile_is_a_chrome_trace(serve: Serve, tmp_path: Path) -> None:
    served = serve(profile_folder=tmp_path)
    assert served.post("/stop_profile").status_code == 400
    assert served.post("/start_profile", num_steps=5).status_code == 400
    assert served.post("/start_profile", record_shapes=True).text == "Start profiling.\n"
    assert served.post("/start_profile").status_code == 400
    served.generate()
    path = Path(served.get("/stop_profile").json()["path"])
    assert path.parent == tmp_path
    names = {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    assert {"asyncsgl::forward", "aten::index_copy_"} <= names
