"""One streamed call as it is shown: its text up to the stops that are enforced here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from .calls import Assembly, Call, Piece, Reply
from .cutting import StopCutter
from .planning import Plan

__all__ = ["Shown"]


class Shown:
    """What of one streamed call is shown: the text up to the stops that are enforced here."""

    def __init__(self, backend: str, plan: Plan) -> None:
        count = plan.call.sampling.n or 1
        self._plan = plan
        self._assembly = Assembly(backend, count)
        self._cutters = [StopCutter(plan.stops, plan.patterns) for _ in range(count)]
        self._cut = False

    async def through(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The pieces as they are shown; ends the call when every answer has met a stop."""
        async with aclosing(pieces):
            async for piece in pieces:
                cutter = self._cutters[piece.index]
                if cutter.stopped():
                    piece = replace(piece, text="", logprobs=(), finish=None)
                else:
                    piece = _cut(piece, cutter)
                self._assembly.add(piece)
                yield piece
                if all(cutter.stopped() for cutter in self._cutters):
                    self._cut = True
                    return

    def reply(self, call: Call) -> Reply:
        """The whole reply; see :meth:`Assembly.reply`."""
        wanted = bool(call.sampling.return_logprob or call.sampling.top_logprobs_num)
        reply = self._assembly.reply(logprobs=wanted, cut=self._cut)
        if self._assembly.has_usage:
            return reply
        prompt = (call.size() + 3) // 4  # the provider says what it cost at the end only
        return replace(reply, usage=replace(reply.usage, prompt_tokens=prompt))


def _cut(piece: Piece, cutter: StopCutter) -> Piece:
    text = cutter.push(piece.text)
    if cutter.stopped():
        return replace(piece, text=text, finish="stop", matched_stop=cutter.matched)
    if piece.finish is not None:
        text += cutter.flush()
    return replace(piece, text=text) if text != piece.text else piece
