"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from .images import keys_of
from .radix import Node
from .request import Request

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of one request.

    Args:
        request: what was asked for.
        serial: order of arrival.
        limit: most tokens it may reach, prompt and output together.
        tokens: prompt and output so far, as far as they are known.
        keys: what its pages are found by, one a token: the tokens themselves, unless it has images.
        drawing: tokens after those, which steps under way draw.
        computed: tokens whose keys and values are in `pages`, or will be after the steps under
            way; the last of them may be one that is not known.
        pages: page ids that hold them, in order.
        synced: leading pages its slot's table is known to have.
        node: where its full pages end in the prefix tree; None outside of it.
        node_pages: how many pages lead there.
        tail: its partly filled page in the tree, if that is there.
        slot: its seat in the runner's tables while it runs, else -1.
        cached_tokens: prompt tokens found in the cache when it first ran.
        scored: positions before this one are not to be scored any more.
        score_end: positions from there on are not to be scored yet: up to here the token that
            follows is known without having been drawn, and its log-probability is wanted.
        closed: whether no token is to be drawn any more, only what is to be scored computed.
        retractions: times it lost its pages to others.
        overtaken: later ones of the same priority that were let in before it.
    """

    request: Request
    serial: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    keys: list[int] = field(init=False)
    drawing: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    synced: int = 0
    node: Node | None = None
    node_pages: int = 0
    tail: Node | None = None
    slot: int = -1
    cached_tokens: int = -1
    scored: int = 0
    score_end: int = 0
    closed: bool = False
    retractions: int = 0
    overtaken: int = 0

    def __post_init__(self) -> None:
        images = self.request.images
        self.keys = keys_of(self.tokens, images) if images else self.tokens
        if self.request.return_logprob and self.request.logprob_start_len >= 0:
            self.scored = max(self.request.logprob_start_len - 1, 0)
            self.score_end = self.prompt_tokens - 1

    def append(self, token: int) -> None:
        """Take the token that follows."""
        self.tokens.append(token)
        if self.keys is not self.tokens:
            self.keys.append(token)

    def force(self, token: int) -> None:
        """Take the token that follows, whatever steps under way draw in its place.

        Where log-probabilities are wanted, the position before it is to be scored; a step under
        way that draws there sees to that itself.
        """
        place = len(self.tokens)
        self.append(token)
        self.drawing = 0
        if self.request.return_logprob:
            if not self.owes_scores:
                self.scored = place if self.computed >= place else place - 1
            self.score_end = place

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens there are, those included that are being drawn."""
        return len(self.tokens) + self.drawing

    @property
    def settled(self) -> int:
        """Tokens that are known as well as computed."""
        return min(self.computed, len(self.tokens))

    @property
    def owes_scores(self) -> bool:
        """Whether positions are to be scored that no step has scored yet."""
        return self.scored < self.score_end

    @property
    def goal(self) -> int:
        """Tokens to have computed: no more once the last one it may have is being drawn."""
        if self.closed:
            return self.score_end if self.owes_scores else self.computed
        if self.drawing and self.output_tokens + self.drawing >= self.max_new_tokens:
            return self.computed
        return self.length

    @property
    def due(self) -> int:
        """Tokens to compute."""
        return self.goal - self.computed

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, as far as they are known."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens it may generate, here."""
        return min(self.request.sampling.max_new_tokens, self.limit - self.prompt_tokens)
