"""Files and batches: results, faults, cancellation, expiry, and a restart in the middle."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Serve, Served
from .process import SMALL, ServerProcess

CHAT = "/v1/chat/completions"


def ask(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": name}], "max_tokens": 4, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def lines(asks: list[Any]) -> bytes:
    texts = (each if isinstance(each, str) else json.dumps(each) for each in asks)
    return "\n".join(texts).encode()


def upload(served: Served, content: bytes, **form: str) -> httpx.Response:
    return httpx.post(
        f"{served.url}/v1/files",
        files={"file": ("asks.jsonl", content)},
        data={"purpose": "batch", **form},
        timeout=60,
    )


def begin(served: Served, asks: list[Any], endpoint: str = CHAT) -> dict[str, Any]:
    body = {
        "input_file_id": upload(served, lines(asks)).json()["id"],
        "endpoint": endpoint,
        "completion_window": "24h",
        "metadata": {"of": "a test"},
    }
    response = served.post("/v1/batches", **body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def ended(served: Served, name: str) -> dict[str, Any]:
    """The batch at its end."""
    while True:
        found: dict[str, Any] = served.get(f"/v1/batches/{name}").json()
        if found["status"] in ("failed", "completed", "expired", "cancelled"):
            return found


def results(served: Served, file: str | None) -> dict[str, Any]:
    """The lines of a result file by their `custom_id`."""
    if file is None:
        return {}
    text = served.get(f"/v1/files/{file}/content").text
    found = [json.loads(line) for line in text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def test_a_batch_answers_each_request_once(serve: Serve, tmp_path: Path) -> None:
    served = serve(batch_folder=tmp_path, batch_concurrency=3)
    asks = [ask(f"number {index}") for index in range(10)]
    asks.append(ask("wrong", temperature=-1))
    asks.append(ask("streamed", stream=True))
    batch = begin(served, asks)
    assert batch["status"] == "validating"
    done = ended(served, batch["id"])
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 12, "completed": 10, "failed": 2}
    assert done["metadata"] == {"of": "a test"}
    good, bad = results(served, done["output_file_id"]), results(served, done["error_file_id"])
    assert set(good) == {f"number {index}" for index in range(10)}
    assert set(bad) == {"wrong", "streamed"}
    one = good["number 3"]["response"]
    assert one["status_code"] == 200
    assert one["body"]["object"] == "chat.completion"
    assert bad["wrong"]["response"]["status_code"] == 400
    assert "temperature" in bad["wrong"]["response"]["body"]["error"]["message"]
    assert served.get("/v1/batches").json()["data"][0]["id"] == batch["id"]
    served.assert_idle()


def test_completions_can_be_batched_too(serve: Serve, tmp_path: Path) -> None:
    served = serve(batch_folder=tmp_path)
    path = "/v1/completions"
    asks = [ask("a", path, prompt="Once", messages=None), ask("b", path, prompt=["x", "y"])]
    done = ended(served, begin(served, asks, path)["id"])
    found = results(served, done["output_file_id"])
    assert [len(found[name]["response"]["body"]["choices"]) for name in "ab"] == [1, 2]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        (ask("\ud800"), "not JSON"),
        (ask("first"), "was there before"),
        ({**ask("x"), "custom_id": 5}, "custom_id"),
        ({**ask("x"), "method": "GET"}, "must be POST"),
        ({**ask("x"), "url": "/v1/embeddings"}, "the batch's endpoint"),
        ({**ask("x"), "body": "text"}, "an object is needed"),
    ],
)
def test_a_bad_line_fails_the_batch_before_it_runs(
    serve: Serve, tmp_path: Path, bad: Any, words: str
) -> None:
    served = serve(batch_folder=tmp_path)
    done = ended(served, begin(served, [ask("first"), "", bad])["id"])
    (fault,) = done["errors"]["data"]
    assert (done["status"], fault["line"]) == ("failed", 3)
    assert words in fault["message"]
    assert served.engine.statistics().finished == 0


def test_a_batch_goes_on_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    first = serve(batch_folder=tmp_path, batch_concurrency=2)
    count = 40
    asks = [ask(f"number {index}", max_tokens=60, ignore_eos=True) for index in range(count)]
    batch = begin(first, asks)
    while first.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] < 3:
        pass
    first.stop()
    kept = tmp_path / "batches" / f"{batch['id']}.output"
    before = kept.read_bytes().splitlines(keepends=True)
    assert 3 <= len(before) < count
    with kept.open("ab") as file:
        file.write(b'{"custom_id": "numb')  # as a crash leaves it
    second = serve(batch_folder=tmp_path, batch_concurrency=8)
    done = ended(second, batch["id"])
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": count, "completed": count, "failed": 0}
    content = second.get(f"/v1/files/{done['output_file_id']}/content").content
    assert content.startswith(b"".join(before))
    assert len(results(second, done["output_file_id"])) == count
    assert second.engine.statistics().finished <= count - len(before)


def test_a_cancelled_batch_keeps_what_it_has(serve: Serve, tmp_path: Path) -> None:
    served = serve(batch_folder=tmp_path, batch_concurrency=2)
    asks = [ask(f"number {index}", max_tokens=60, ignore_eos=True) for index in range(40)]
    batch = begin(served, asks)
    waiting = begin(served, [ask("later")])
    while served.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] < 2:
        pass
    assert served.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "cancelling"
    done = ended(served, batch["id"])
    assert done["status"] == "cancelled"
    assert 2 <= len(results(served, done["output_file_id"])) < 40
    assert ended(served, waiting["id"])["status"] == "completed"
    served.assert_idle()


def test_a_batch_that_is_late_expires_with_a_line_for_each_request(
    serve: Serve, tmp_path: Path
) -> None:
    first = serve(batch_folder=tmp_path, batch_concurrency=1)
    asks = [ask(f"number {index}", max_tokens=200, ignore_eos=True) for index in range(20)]
    batch = begin(first, asks)
    first.stop()
    path = tmp_path / "batches" / f"{batch['id']}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires_at": 1}))
    second = serve(batch_folder=tmp_path)
    done = ended(second, batch["id"])
    assert done["status"] == "expired"
    late = results(second, done["error_file_id"])
    assert len(late) + len(results(second, done["output_file_id"])) == 20
    assert {each["error"]["code"] for each in late.values()} == {"batch_expired"}


def test_a_folder_has_one_server(serve: Serve, tmp_path: Path) -> None:
    serve(batch_folder=tmp_path)
    second = serve(batch_folder=tmp_path)
    response = second.get("/v1/batches")
    assert response.status_code == 501
    assert "another server keeps its batches" in response.json()["error"]["message"]


def test_without_a_folder_there_are_no_batches(served: Served) -> None:
    assert served.get("/v1/files").status_code == 501


def test_lists_come_in_pages_newest_first(serve: Serve, tmp_path: Path) -> None:
    served = serve(batch_folder=tmp_path)
    batches = [begin(served, [ask("x")])["id"] for _ in range(3)]
    for name in batches:
        ended(served, name)
    listed = [each["id"] for each in served.get("/v1/batches").json()["data"]]
    assert sorted(listed) == sorted(batches)
    first = served.get("/v1/batches?limit=2").json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (listed[:2], True)
    assert (first["first_id"], first["last_id"]) == (listed[0], listed[1])
    rest = served.get(f"/v1/batches?limit=2&after={first['last_id']}").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (listed[2:], False)


@pytest.mark.timeout(120)
def test_a_batch_outlives_a_server_that_is_killed(
    start: Callable[..., ServerProcess], tiny_model: Path, tmp_path: Path
) -> None:
    places = ("--batch-folder", str(tmp_path), "--batch-concurrency", "2")
    command = ("asyncsgl", "serve", "--model", str(tiny_model), "--port", "0", *SMALL, *places)
    first = start(*command)
    asks = [ask(f"number {index}", max_tokens=60, ignore_eos=True) for index in range(30)]
    file = httpx.post(
        f"{first.url}/v1/files", files={"file": ("asks", lines(asks))}, data={"purpose": "batch"}
    ).json()["id"]
    wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    name = httpx.post(f"{first.url}/v1/batches", json=wanted).json()["id"]
    while not httpx.get(f"{first.url}/v1/batches/{name}").json()["request_counts"]["completed"]:
        pass
    first.signal(signal.SIGKILL)
    first.status()
    second = start(*command)
    while (batch := httpx.get(f"{second.url}/v1/batches/{name}").json())["status"] != "completed":
        assert batch["status"] in ("in_progress", "finalizing")
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    output = httpx.get(f"{second.url}/v1/files/{batch['output_file_id']}/content").text
    names = [json.loads(line)["custom_id"] for line in output.splitlines()]
    assert sorted(names) == sorted(each["custom_id"] for each in asks)


def test_files_come_and_go(serve: Serve, tmp_path: Path) -> None:
    served = serve(batch_folder=tmp_path, max_uploads=5000)
    file = upload(served, b"some text").json()
    assert (file["bytes"], file["filename"], file["purpose"]) == (9, "asks.jsonl", "batch")
    assert served.get(f"/v1/files/{file['id']}").json() == file
    assert served.get("/v1/files?purpose=batch&limit=1").json()["data"] == [file]
    assert served.get("/v1/files?purpose=other").json()["data"] == []
    assert served.get(f"/v1/files/{file['id']}/content").content == b"some text"
    assert upload(served, b"x" * 6000).status_code == 413
    assert upload(served, b"x", purpose="fine-tune").status_code == 400
    gone = httpx.delete(f"{served.url}/v1/files/{file['id']}")
    assert gone.json() == {"id": file["id"], "object": "file", "deleted": True}
    for name in (file["id"], "..%2F..%2Flock", "no-such-id"):
        assert served.get(f"/v1/files/{name}").status_code == 404
    assert served.post("/v1/batches", input_file_id="file-x", endpoint=CHAT).status_code == 400
    body = {"input_file_id": "file-x", "completion_window": "24h"}
    assert served.post("/v1/batches", **body, endpoint=CHAT).status_code == 404
    assert served.post("/v1/batches", **body, endpoint="/v1/embeddings").status_code == 400
