"""Second starts: what the first one learnt is used while it holds, and only then."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.hub import DEFAULT_MODEL, resolve_model
from asyncsgl_engine.hub.cache import default_cache_root
from asyncsgl_engine.hub.notes import Notes, Subject
from asyncsgl_engine.native import Library
from asyncsgl_engine.recall import Memory
from asyncsgl_engine.request import Request, Sampling
from tests.engine.compiled import compiled
from tests.engine.conftest import byte_tokenizer, save_model
from tests.engine.test_native import MODELS

pytestmark = pytest.mark.timeout(120)

PROMPT = tuple(b"The first start")
GREEDY = Sampling(max_new_tokens=24, temperature=0.0, ignore_eos=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library() -> Library:
    return compiled()


@pytest.fixture
def starts(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that remembers nothing yet but has the compiled code; what it will be kept in."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "native").symlink_to(default_cache_root() / "native")
    monkeypatch.setenv("ASYNCSGL_CACHE", str(cache))
    return cache / "starts"


@dataclass(frozen=True)
class Started:
    """What came of a start.

    Args:
        recalled: whether it did without transformers' model.
        tokens: of a greedy answer.
        logprobs: of the prompt's tokens.
        stages: what it told of its progress.
        template: for messages.
    """

    recalled: bool
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stages: tuple[tuple[str, float | None], ...]
    template: str | None


def start(folder: Path, **settings: Any) -> Started:
    """Start an engine over a folder, and ask it something."""
    return asyncio.run(_start(folder, settings))


async def _start(folder: Path, settings: dict[str, Any]) -> Started:
    stages: list[tuple[str, float | None]] = []
    options = {"dtype": "float32", "max_total_tokens": 2000, "num_threads": 1, **settings}
    engine = AsyncEngine(EngineConfig(str(folder), **options))
    await engine.start(lambda *told: stages.append(told))
    try:
        scored = replace(Request("scored", PROMPT, Sampling(max_new_tokens=0)), return_logprob=True)
        answer = await engine.generate(Request("answer", PROMPT, GREEDY))
        told = await engine.generate(replace(scored, logprob_start_len=0))
        recalled, template = not engine.tokenizer.whole, engine.tokenizer.chat_template
    finally:
        await engine.aclose()
    logprobs = tuple(entry.logprob or 0.0 for entry in told.prompt_logprobs)
    return Started(recalled, answer.token_ids, logprobs, tuple(stages), template)


def expected(folder: Path) -> tuple[int, ...]:
    """The greedy answer by transformers' `generate`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(made[0, len(PROMPT) :].tolist())


def save(name: str, folder: Path) -> Path:
    """A tiny random model of a kind that compiled code runs."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(MODELS[name]())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases, which begin as ones and zeros
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what is remembered ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_second_start_answers_as_the_first(name: str, starts: Path, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    first, second = start(folder), start(folder)
    assert (first.recalled, second.recalled) == (False, True)
    assert first.tokens == second.tokens == expected(folder)
    assert first.logprobs == second.logprobs
    low = start(folder, dtype="bfloat16"), start(folder, dtype="bfloat16")
    assert [each.recalled for each in low] == [False, True]
    assert low[0].tokens == low[1].tokens
    assert low[0].logprobs == low[1].logprobs


def test_a_model_in_several_files_is_remembered(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    first, second = start(folder), start(folder)
    assert (first.recalled, second.recalled) == (False, True)
    assert first.tokens == second.tokens


def test_a_model_that_compiled_code_does_not_run_is_loaded_as_ever(
    starts: Path, tmp_path: Path
) -> None:
    folder = save_model("gpt2", tmp_path / "model")
    first, second = start(folder), start(folder)
    assert (first.recalled, second.recalled) == (False, False)
    assert first.tokens == second.tokens == expected(folder)
    assert not starts.exists()


def test_without_compiled_code_nothing_is_remembered(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    for _ in range(2):
        assert not (start(folder, enable_native=False)).recalled
    assert not starts.exists()


def test_weights_that_the_files_have_otherwise_are_not_remembered(
    starts: Path, tmp_path: Path
) -> None:
    folder = save("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    first, second = start(folder), start(folder)
    assert (first.recalled, second.recalled) == (False, False)
    assert first.tokens == second.tokens == expected(folder)


def test_progress_grows_to_its_end(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    for started in (start(folder), start(folder)):
        names = list(dict.fromkeys(stage for stage, _ in started.stages))
        assert names == ["Starting PyTorch", "Loading the model"]
        shares = [share for _, share in started.stages if share is not None]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert shares.count(1.0) == 1
        assert started.recalled == (len(shares) > 1)


# -- when it holds no more ------------------------------------------------------------------


def test_another_configuration_is_read_anew(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    before = [start(folder), start(folder)][1]
    edit_config(folder, rms_norm_eps=0.5)
    changed, again = start(folder), start(folder)
    assert (before.recalled, changed.recalled, again.recalled) == (True, False, True)
    assert changed.tokens == again.tokens == expected(folder)
    assert changed.logprobs != before.logprobs


def test_other_weights_show_though_their_file_looks_the_same(starts: Path, tmp_path: Path) -> None:
    """As when a large file, which is told by size and time, is replaced within a second."""
    folder = save("llama", tmp_path / "model")
    before = start(folder)
    notes = {path.name: path.read_bytes() for path in starts.iterdir()}
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(weights, path, {"format": "pt"})
    assert not (start(folder)).recalled
    for name, old in notes.items():  # what was learnt of the old weights, said of the new ones
        traits = (starts / name).read_bytes().split(b"\n", 2)[1]
        Notes(starts).write(
            Subject(name.removesuffix(".note"), json.loads(traits)), old.split(b"\n", 2)[2]
        )
    changed = start(folder)
    assert not changed.recalled
    assert changed.tokens == expected(folder)
    assert changed.logprobs != before.logprobs
    assert (start(folder)).recalled


def test_another_tokenizer_is_read_anew(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    start(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 'new' }}"}))
    assert not (start(folder)).recalled
    again = start(folder)
    assert again.recalled
    assert again.template == "{{ 'new' }}"


def test_other_compiled_code_is_tried_anew(starts: Path, library: Library, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    start(folder)
    source = default_cache_root() / "native" / library.name
    other = tmp_path / "decoder-of-another-source.so"
    other.write_bytes(source.read_bytes())

    def recalled(code: Library) -> bool:
        memory = Memory(Notes(starts), folder, folder, "float32", code)
        return memory.recall(lambda _: None) is not None

    assert recalled(library)
    assert not recalled(Library(other))
    assert recalled(library)  # what is of no use to one is not lost for another


# -- what may happen to the memory ----------------------------------------------------------


def broken(content: bytes) -> dict[str, bytes]:
    half = len(content) // 2
    flipped = bytes([content[half] ^ 1])
    return {
        "empty": b"",
        "cut short": content[:half],
        "one bit flipped": content[:half] + flipped + content[half + 1 :],
        "something else": b"\x00\xff" * 1000,
    }


@pytest.mark.parametrize("kind", broken(b"ab"))
@pytest.mark.parametrize("part", ["float32", "tokenizer"])
def test_a_damaged_note_is_as_good_as_none(
    kind: str, part: str, starts: Path, tmp_path: Path
) -> None:
    folder = save("llama", tmp_path / "model")
    first = start(folder)
    (note,) = starts.glob(f"*-{part}.note")
    note.write_bytes(broken(note.read_bytes())[kind])
    damaged, mended = start(folder), start(folder)
    assert (damaged.recalled, mended.recalled) == (False, True)
    assert first.tokens == damaged.tokens == mended.tokens


@pytest.mark.parametrize("part", ["float32", "tokenizer"])
def test_a_note_that_is_whole_but_makes_no_sense_is_as_good_as_none(
    part: str, starts: Path, tmp_path: Path
) -> None:
    folder = save("llama", tmp_path / "model")
    start(folder)
    (note,) = starts.glob(f"*-{part}.note")
    traits = json.loads(note.read_bytes().split(b"\n", 2)[1])
    for body in (b"", b"{}", b"[1]", b'{"facts": 1}', b"null\n{}"):
        Notes(starts).write(Subject(note.stem, traits), body)
        assert not (start(folder)).recalled
        assert (start(folder)).recalled


def test_a_model_starts_where_nothing_can_be_remembered(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    starts.write_text("a file where the folder should be")
    for _ in range(2):
        assert not (start(folder)).recalled


def test_starts_at_the_same_time_do_not_disturb_each_other(starts: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(start, [folder] * 4))
        second = list(pool.map(start, [folder] * 4))
    assert all(each.recalled for each in second)
    assert {each.tokens for each in (*first, *second)} == {expected(folder)}
    assert {path.suffix for path in starts.iterdir()} == {".note"}


def test_the_oldest_notes_make_room(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    subjects = [Subject(f"model-{number}", {"number": number}) for number in range(40)]
    for number, subject in enumerate(subjects):
        notes.write(subject, b"body")
        os.utime(tmp_path / f"{subject.name}.note", (number, number))
    assert notes.read(subjects[10]) == b"body"  # and so it is not among the oldest any more
    for number in range(40, 60):
        notes.write(Subject(f"model-{number}", {}), b"body")
    assert len(list(tmp_path.iterdir())) == 32
    assert notes.read(subjects[10]) == b"body"
    assert notes.read(subjects[11]) is None


# -- what it is good for --------------------------------------------------------------------

_ASK = """
import asyncio, sys
import asyncsgl as sgl

@sgl.function
async def capital(s):
    s += sgl.user("What is the capital of France?")
    s += sgl.assistant(sgl.gen("x", max_tokens=8, temperature=0))

async def main():
    async with sgl.Runtime(max_total_tokens=4096, num_threads=1) as runtime:
        print((await capital.run(backend=runtime))["x"])

asyncio.run(main())
print(sorted({name.partition(".")[0] for name in sys.modules}))
print([name for name in ("torch._dynamo", "torch.distributed.tensor") if name in sys.modules])
"""


@pytest.mark.timeout(300)  # the default model may have to be fetched
def test_the_second_start_of_the_default_model_imports_little(library: Library) -> None:
    resolve_model(DEFAULT_MODEL)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "engine")))

    def start_and_ask() -> tuple[list[str], str, str]:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        *answer, modules, parts = done.stdout.strip().splitlines()
        return answer, modules, parts

    first, (second, modules, parts) = start_and_ask()[0], start_and_ask()
    assert first == second
    assert "Paris" in second[0]
    heavy = {"accelerate", "llguidance", "sympy", "transformers", "triton"}
    assert heavy.isdisjoint(json.loads(modules.replace("'", '"')))
    assert parts == "[]"
