"""What transformers says of an answer: its own greedy one, and whether drawn tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asyncsgl_engine.request import Completion, Request, Sampling, TokenLogprob
from asyncsgl_engine.sampler import uniform

__all__ = ["Oracle"]

_LOGPROB = 2e-4  # how far log-probabilities may be off in float32
_CHANCE = 1e-4  # and shares of the distribution


@dataclass(frozen=True)
class Oracle:
    """A model as transformers computes it.

    Args:
        model: loaded.
    """

    model: PreTrainedModel

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Oracle:
        """Load a model folder."""
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))

    def generate(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The greedy answer, without an end."""
        ids = torch.tensor([list(prompt)])
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tuple(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after each token, (len(tokens), vocab)."""
        made: Any = self.model(torch.tensor([list(tokens)]), use_cache=False)
        found: torch.Tensor = made.logits[0].float()
        return found

    def check_tokens(self, request: Request, answer: Completion, ends: Sequence[int] = ()) -> None:
        """Every token is the one to be drawn after those before it.

        Args:
            ends: tokens that end the sequence.
        """
        prompt, sampling = list(request.prompt_ids), request.sampling
        whole = prompt + list(answer.token_ids)
        logits = self.logits(whole)
        for place, token in enumerate(answer.token_ids):
            before = whole[: len(prompt) + place]
            scores = _processed(logits[len(before) - 1], before, len(prompt), sampling, ends)
            if sampling.greedy:
                assert scores[token] > scores.max() - _LOGPROB, (request, place)
                continue
            assert sampling.seed is not None, "without a seed, nobody knows the chance"
            seed = np.array([sampling.seed % 2**64], dtype=np.uint64)
            chance = float(uniform(seed, np.array([place], dtype=np.uint64))[0])
            low, high = _interval(scores, token, _filters(sampling))
            assert low - _CHANCE <= chance <= high + _CHANCE, (request, place)

    def check_logprobs(self, request: Request, answer: Completion) -> None:
        """All log-probabilities that were asked for are the model's own."""
        prompt = list(request.prompt_ids)
        whole = prompt + list(answer.token_ids)
        known = self.logits(whole).log_softmax(-1)
        assert len(answer.logprobs) == (len(answer.token_ids) if request.return_logprob else 0)
        for place, entry in enumerate(answer.logprobs, len(prompt)):
            _check_entry(request, entry, whole[place], known[place - 1])
        start = request.logprob_start_len
        assert len(answer.prompt_logprobs) == (len(prompt) - start if start >= 0 else 0)
        for place, entry in enumerate(answer.prompt_logprobs, start):
            if place == 0:
                assert entry == TokenLogprob(prompt[0], None)
            else:
                _check_entry(request, entry, prompt[place], known[place - 1])


def _check_entry(request: Request, entry: TokenLogprob, token: int, known: torch.Tensor) -> None:
    assert entry.token_id == token
    assert entry.logprob is not None
    assert abs(entry.logprob - float(known[token])) < _LOGPROB
    values = known.topk(request.top_logprobs_num).values.tolist()
    assert len(entry.top) == len(values) == len({token for token, _ in entry.top})
    for (listed, logprob), value in zip(entry.top, values, strict=True):
        assert abs(logprob - value) < _LOGPROB
        assert abs(logprob - float(known[listed])) < _LOGPROB
    assert tuple(token for token, _ in entry.chosen) == request.token_ids_logprob
    for listed, logprob in entry.chosen:
        assert abs(logprob - float(known[listed])) < _LOGPROB


def _processed(
    logits: torch.Tensor, before: list[int], prompt: int, sampling: Sampling, ends: Sequence[int]
) -> torch.Tensor:
    """Scores after transformers' processors; frequency and presence as OpenAI defines them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.logit_bias:
        biases: Any = [[[token], bias] for token, bias in sampling.logit_bias]
        processors.append(SequenceBiasLogitsProcessor(biases))
    stops = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)]
    if sampling.min_new_tokens and stops:
        least = sampling.min_new_tokens
        processors.append(MinNewTokensLengthLogitsProcessor(prompt, least, stops))
    if not sampling.greedy:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            processors.append(MinPLogitsWarper(sampling.min_p))
    ids: Any = torch.tensor([before])
    seen = torch.bincount(ids[0, prompt:], minlength=len(logits))
    changed = seen * sampling.frequency_penalty + (seen > 0) * sampling.presence_penalty
    # The repetition penalty comes first, and what is subtracted from scores commutes with biases.
    if sampling.repetition_penalty != 1.0:
        logits = processors.pop(0)(ids, logits[None].clone())[0]
    scores: torch.Tensor = processors(ids, (logits - changed)[None].float())
    return scores[0]


def _filters(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _interval(scores: torch.Tensor, token: int, ranked: bool) -> tuple[float, float]:
    """Between which chances a token is drawn: in the vocabulary's order, or the best first."""
    shares = scores.double().softmax(-1)
    order = shares.argsort(descending=True, stable=True) if ranked else torch.arange(len(shares))
    reached = shares[order].cumsum(0)
    place = int((order == token).nonzero()[0, 0])
    return float(reached[place] - shares[token]), float(reached[place])
