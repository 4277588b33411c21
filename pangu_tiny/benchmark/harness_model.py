"""A checkpoint as lm-evaluation-harness (lm-eval 0.4) asks it, answered by the same scorer.

What it asks is put as its adapter of Hugging Face's models puts it, so that results are the same:
ids with a begin mark where the model has one; what is too long cut on the left, that mark included.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pangu_tiny.benchmark.answers import Request
from pangu_tiny.benchmark.examined import Examined
from pangu_tiny.benchmark.scorer import Shared
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.continuation import Asked
from pangu_tiny.evaluation.sampling import Sampling
from pangu_tiny.workdir import digest_of

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation: as texts, in ids."""

_WRITTEN = 256  # tokens, where a task does not say how many: lm-eval's own default


class HarnessModel(TemplateLM):
    """A model that is asked, in lm-eval's words."""

    def __init__(self, examined: Examined):
        super().__init__()
        self._examined, self._opened = examined, examined.opened
        self._tokenizer, self._longest = examined.opened.tokenizer(), examined.longest

    @property
    def eot_token_id(self) -> int:
        return self._opened.about["end_id"]

    @property
    def prefix_token_id(self) -> int:
        begin = self._opened.about["begin_id"]
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        begin = self._opened.about["begin_id"]
        marks = [] if begin is None or add_special_tokens is False else [begin]
        return marks + self._tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each the log-likelihood of its continuation, and whether it is the likeliest. Those
        that follow one another and have one context are choices of a question."""
        asked = []
        for (_, start), group in itertools.groupby(requests, self._context):
            whole = [(first + after)[-self._longest - 1 :] for _, first, after in group]
            shared = Shared.of(whole, start)
            key = f"lm-eval/likelihood/{digest_of(shared)}"
            asked.append(Request(key, shared))
        each = list({one.key: one for one in asked}.values())
        by_key = self._examined.likelihoods("lm-eval", each, likeliest=True)
        found: list[tuple[float, bool]] = []
        for one in asked:
            nats, likeliest = np.split(np.asarray(by_key[one.key]), 2)
            found += zip((-nats).tolist(), (likeliest > 0).tolist(), strict=True)
        return found

    def _context(self, pair: Pair) -> tuple[Any, int]:
        """What makes a request a choice of the same question as the one before: its context, if
        there is one, and how many ids of it are left, after which the ids are scored."""
        texts, context, continuation = pair
        left = min(len(context), self._longest + 1 - len(continuation))
        if left < 1:
            raise UserError(
                f"benchmark.tasks: one asks for {len(continuation)} tokens at a time, but the model"
                f" was trained on sequences of {self._longest}"
            )
        return (texts and texts[0]) or object(), left

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Of whole documents, in windows as long as the model allows, each token once."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self._longest, 1
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens(list(itertools.chain.from_iterable(windows))))
        return [
            sum(likelihood for likelihood, _ in itertools.islice(found, len(of_one)))
            for of_one in windows
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What is written after each prompt, without the text before which it ends."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True)
            by_settings.setdefault(settings, []).append(number)
        texts: dict[int, str] = {}
        for settings, numbers in by_settings.items():
            given = normalize_gen_kwargs(json.loads(settings), _WRITTEN)
            tokens, stop = given["max_gen_toks"], [text for text in given["until"] if text]
            if tokens >= self._longest:
                raise UserError(
                    f"benchmark.tasks: one writes {tokens} tokens, but the model was trained on"
                    f" sequences of {self._longest}"
                )
            prompts = [requests[number].args[0] for number in numbers]
            before: Counter[str] = Counter()
            asked = []
            for prompt in prompts:
                ids = self.tok_encode(prompt)[tokens - self._longest :]
                marks = int(ids[:1] == [self._opened.about["begin_id"]])
                # Repeated, a prompt is answered anew.
                key = f"lm-eval/written/{digest_of([settings, ids, before[prompt]])}"
                before[prompt] += 1
                asked.append(Request(key, Asked(prompt, ids, marks)))
            sampling = Sampling(
                given["temperature"] if given["do_sample"] else 0.0,
                given.get("top_k") or 0,
                given.get("top_p", 1.0),
            )
            found = self._examined.written("lm-eval", asked, sampling, tokens, stop)
            for number, one in zip(numbers, asked, strict=True):
                # Decoded on its own, as the others do it, what begins with a space has none.
                texts[number] = str(found[one.key]).removeprefix(" ")
        return [texts[number] for number in range(len(requests))]
