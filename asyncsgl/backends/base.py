"""The contract between programs and the places where models run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from ..errors import UnsupportedFeature
from ..lang.chat_template import ChatTemplate, get_chat_template
from ..sampling import SAMPLING_FIELDS
from ..types import Delta, Generation, GenRequest, Media, Scores

__all__ = ["FEATURES", "Backend", "Capabilities", "Support"]

Support = Literal["native", "emulated", "refused"]

FEATURES: tuple[str, ...] = (
    "raw_text",
    "chat",
    "continue_assistant",
    "select",
    "regex",
    "json_schema",
    "ebnf",
    "image",
    "video",
    "reasoning",
    *SAMPLING_FIELDS,
)
"""Everything that a backend declares to be native, emulated or refused."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. A feature in neither set is refused.

    Args:
        native: features that the backend has itself.
        emulated: features that asyncsgl makes from others there.
        hints: for a refused feature, what to do instead.
        wants_text: the backend takes the prompt as one text, not as messages.
    """

    native: frozenset[str] = frozenset()
    emulated: frozenset[str] = frozenset()
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    wants_text: bool = False

    def __post_init__(self) -> None:
        unknown = (self.native | self.emulated | set(self.hints)) - set(FEATURES)
        assert not unknown, f"not features: {sorted(unknown)}"

    def support(self, feature: str) -> Support:
        """How ``feature`` is supported."""
        if feature in self.native:
            return "native"
        return "emulated" if feature in self.emulated else "refused"


class Backend(ABC):
    """A place where models run.

    A backend is used as ``async with`` and from any number of tasks, threads and
    event loops; it makes its clients for a loop at the first use there.
    """

    name: str = "backend"
    chat_template: ChatTemplate | None = None
    """A template that replaces the backend's own; set it at any time."""
    keeps_prefixes: bool = False
    """Whether :meth:`cache_prefix` saves work for prompts that begin alike."""
    default_concurrency: int = 64
    """How many requests at once are sensible when nobody says a number."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @property
    def identity(self) -> str:
        """What answers here: equal for backends that give equal answers. Has no secrets."""
        model = getattr(self, "model_name", getattr(self, "model_path", ""))
        return f"{self.name}:{model}"

    @abstractmethod
    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request.

        Raises:
            UnsupportedFeature: before anything is sent.
            BackendError: the provider, server or engine refused or failed.
            ClosedError: the backend was closed.
        """

    @abstractmethod
    def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; the last delta has the generation.

        Closing the iterator early cancels the call. Raises as :meth:`generate`, and
        TruncatedStreamError when the stream ends without its end marker.
        """

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score ``choices`` as continuations of the request's prompt.

        Args:
            request: the prompt; its sampling counts only where choosing is emulated.
            choices: at least one text.
            unconditional: also score the choices without the prompt.

        Raises:
            UnsupportedFeature: the backend can neither score nor emulate it.
        """
        raise UnsupportedFeature(self.name, "select")

    async def chat_template_in_use(self) -> ChatTemplate:
        """The template that makes text of messages: for the prompt, and for ``state.text()``."""
        return self.chat_template or get_chat_template("default")

    def statistics(self) -> Mapping[str, float]:
        """Counters of this backend, by name."""
        return {}

    async def cache_prefix(self, request: GenRequest) -> None:
        """Compute the request's prompt ahead, where the backend has a cache for it.

        Raises:
            UnsupportedFeature: the backend has none.
        """
        raise UnsupportedFeature(self.name, "cache_prefix")

    async def get_server_info(self) -> dict[str, object]:
        """The settings and the state of the server or engine behind this, by its own names.

        Raises:
            UnsupportedFeature: there is none to ask.
        """
        raise UnsupportedFeature(self.name, "get_server_info")

    async def flush_cache(self, *, wait: bool = False) -> bool:
        """Empty the prefix cache; False, and nothing done, while requests run.

        Args:
            wait: wait until no request runs, then empty it.

        Raises:
            UnsupportedFeature: the backend has none that could be emptied.
        """
        raise UnsupportedFeature(self.name, "flush_cache")

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        """Begin to record what the model's processors do.

        Args:
            output_dir: the folder for the traces, on the machine that runs the model.
            num_steps: after how many steps to stop without being told.

        Returns:
            What the server or engine says to it.

        Raises:
            UnsupportedFeature: the backend cannot.
        """
        raise UnsupportedFeature(self.name, "start_profile")

    async def stop_profile(self) -> str:
        """End what :meth:`start_profile` began; what the server or engine says to it.

        Raises:
            UnsupportedFeature: the backend cannot.
        """
        raise UnsupportedFeature(self.name, "stop_profile")

    async def aclose(self) -> None:
        """Release everything; closing twice is fine."""
        return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    def check(self, request: GenRequest) -> None:
        """Refuse what this backend cannot do.

        Raises:
            UnsupportedFeature: names the feature and, where there is one, the way around.
        """
        self._check_features(_features_of(request))

    def check_select(self, request: GenRequest) -> None:
        """Refuse a ``select`` that this backend cannot do; see :meth:`check`."""
        sampling = set(request.sampling.given())
        needed = [name for name in _features_of(request) if name not in sampling]
        self._check_features(["select", *needed])

    def _check_features(self, features: Sequence[str]) -> None:
        can = self.capabilities
        for feature in features:
            if can.support(feature) == "refused":
                raise UnsupportedFeature(self.name, feature, can.hints.get(feature, ""))


def _features_of(request: GenRequest) -> list[str]:
    """The features that a request needs."""
    needed = list(request.sampling.given())
    if request.constraint is not None:
        needed.append(request.constraint.kind)
    roles = {message.role for message in request.messages}
    if None in roles:
        needed.append("raw_text")
    if roles - {None}:
        needed.append("chat")
    if request.continue_assistant and request.messages[-1].parts:
        needed.append("continue_assistant")
    needed += [
        part.kind
        for message in request.messages
        for part in message.parts
        if isinstance(part, Media)
    ]
    return needed
