"""Judges bodies by SGLang's own request and response models; run with the package installed.

Reads a JSON list of [kind, value] from the standard input and prints a list of what is wrong with
each, null where nothing is.
"""

# Only the models are wanted, not the package's kernels: what they import besides is left out.
import enum
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from typing import Any

VOCABULARY = 49152


class Scheduler(types.ModuleType):
    """Stands in for the scheduler's module, of which the models want a few names."""

    Modality = enum.Enum("Modality", {"IMAGE": "image", "VIDEO": "video", "AUDIO": "audio"})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Any

    @staticmethod
    def get_return_hidden_states_mode(mode: object) -> object:
        return mode


class Tokenizer:
    """As much of one as stop strings need."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]


def _prepared() -> None:
    package = types.ModuleType("sglang")
    found = importlib.util.find_spec("sglang")
    assert found is not None
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["sglang"] = package
    notebook: Any = types.ModuleType("IPython.display")
    notebook.HTML = notebook.display = print
    sys.modules["IPython"] = types.ModuleType("IPython")
    sys.modules["IPython.display"] = notebook
    name = "sglang.srt.managers.schedule_batch"
    sys.modules[name] = Scheduler(name)


_prepared()
TypeAdapter = importlib.import_module("pydantic").TypeAdapter
contract = importlib.import_module("sglang.api.v1.api_types")
requests = importlib.import_module("sglang.srt.managers.io_struct")
sampling = importlib.import_module("sglang.srt.sampling.sampling_params")
openai = importlib.import_module("sglang.srt.entrypoints.openai.protocol")
msgspec = importlib.import_module("msgspec")
loads = importlib.import_module("sglang.srt.managers.load_snapshot")


def generate(body: Any) -> None:
    """A body of `/generate`: its shape, its batch, and each set of sampling parameters."""
    contract.GenerateRequest.from_json_value(body)
    asked = TypeAdapter(requests.GenerateReqInput).validate_python(body)
    asked.normalize_batch_and_arguments()
    given = body.get("sampling_params") or {}
    for each in given if isinstance(given, list) else [given]:
        params = sampling.SamplingParams(**each)
        params.normalize(Tokenizer())
        params.verify(VOCABULARY)


def answer(body: Any) -> None:
    """One answer of `/generate`, or one chunk of its stream."""
    read = contract.GenerateResponse.from_json_value(body)
    assert read.text == body["text"]
    assert read.meta_info is not None
    reason = read.meta_info.finish_reason
    assert not isinstance(reason, dict), f"a finish reason it cannot read: {reason}"


def load(body: Any) -> None:
    """One entry of `/v1/loads`."""
    shared = {name: body[name] for name in loads._CORE_KEYS if name in body}
    missing = {"num_running_reqs", "num_waiting_reqs", "num_used_tokens"} - shared.keys()
    assert not missing, f"lacks {sorted(missing)}"
    read = msgspec.convert(shared, loads.LoadSnapshot)
    assert {name: getattr(read, name) for name in shared} == shared


JUDGES: dict[str, Callable[[Any], object]] = {
    "generate": generate,
    "abort": TypeAdapter(requests.AbortReq).validate_python,
    "profile": TypeAdapter(requests.ProfileReq).validate_python,
    "answer": answer,
    "stream_error": contract.GenerateStreamError.from_json_value,
    "model_info": contract.GetModelInfoResponse.from_json_value,
    "server_info": contract.GetServerInfoResponse.from_json_value,
    "load": load,
    "chat": openai.ChatCompletionResponse.model_validate,
    "chat_chunk": openai.ChatCompletionStreamResponse.model_validate,
    "completion": openai.CompletionResponse.model_validate,
    "completion_chunk": openai.CompletionStreamResponse.model_validate,
    "models": openai.ModelList.model_validate,
    "tokens": openai.TokenizeResponse.model_validate,
    "text": openai.DetokenizeResponse.model_validate,
    "error": openai.ErrorResponse.model_validate,
}


def judged(kind: str, value: Any) -> str | None:
    try:
        JUDGES[kind](value)
    except Exception as error:  # noqa: BLE001 - it is the verdict
        return f"{type(error).__name__}: {error}"
    return None


print(json.dumps([judged(kind, value) for kind, value in json.load(sys.stdin)]))
