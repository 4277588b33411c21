"""A checkpoint as lm-evaluation-harness (lm-eval 0.4) asks it, answered by the same scorer.

What it asks is put as its adapter of Hugging Face's models puts it, so that results are the same:
ids with a begin mark where the model has one; what is too long cut on the left, that mark included.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pangu_tiny.benchmark.answers import Request
from pangu_tiny.benchmark.examined import Examined
from pangu_tiny.benchmark.put import encodable, known
from pangu_tiny.benchmark.scorer import Shared
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.continuation import Asked
from pangu_tiny.evaluation.sampling import GREEDY, Sampling
from pangu_tiny.tokenizer.tokenizer_json import TokenizerJson
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
        if self.eot_token_id is None and self.prefix_token_id is None:
            raise UserError(
                f"checkpoint {self._opened.path} has neither a begin nor an end mark, one of which"
                " lm-eval puts before a text"
            )

    @property
    def eot_token_id(self) -> int | None:
        return self._opened.about["end_id"]

    @property
    def prefix_token_id(self) -> int | None:
        begin = self._opened.about["begin_id"]
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """By the rules of a whole vocabulary's own tokenizer, else behind the begin mark."""
        text, marked = encodable("a text", string), add_special_tokens is not False
        if isinstance(self._tokenizer, TokenizerJson):
            ids = self._tokenizer.encode(text, marks=marked)
        else:
            begin = self._opened.about["begin_id"]
            ids = [begin] * (marked and begin is not None) + self._tokenizer.encode(text)
        return known(self._opened, f"{text:.40}", ids)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        if any(not "".join(request.args) for request in requests):
            raise UserError("benchmark.tasks: one asks how likely an empty text is")
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each the log-likelihood of its continuation, and whether it is the likeliest. Those
        that follow one another and have one context are choices of a question."""
        asked = []
        for start, whole in self._questions(requests):
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

    def _questions(self, requests: Sequence[Pair]) -> Iterator[tuple[int, list[list[int]]]]:
        """Whole texts of choices, and how many ids of their context are left. They have the same
        context and follow one another, and are no more than fill a row of the longest."""
        group: list[list[int]] = []
        before, room = (None, 0), 0
        for texts, context, continuation in requests:
            left = min(len(context), self._longest + 1 - len(continuation))
            if left < 1:
                asked = f"{len(continuation)} tokens after a context of {len(context)}"
                raise UserError(
                    f"benchmark.tasks: one asks for {asked}, but the model was trained on sequences"
                    f" of {self._longest}"
                )
            now: Any = ((texts and texts[0]) or object(), left)
            room -= len(continuation)
            if group and (now != before or room < 0):
                yield before[1], group
                group = []
            if not group:
                room = self._longest - left - len(continuation)
            group.append((context + continuation)[-self._longest - 1 :])
            before = now
        if group:
            yield before[1], group

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
            sampling, tokens, stop = self.writing(json.loads(settings), self._longest)
            before: Counter[str] = Counter()
            asked = []
            for prompt in (requests[number].args[0] for number in numbers):
                ids = self.tok_encode(prompt)[tokens - self._longest :]
                marks = int(ids[:1] == [self._opened.about["begin_id"]])
                digest = digest_of([settings, ids])
                # Repeated, a prompt is answered anew.
                key = f"lm-eval/written/{digest}/{before[digest]}"
                before[digest] += 1
                asked.append(Request(key, Asked(prompt, ids, marks)))
            found = self._examined.written("lm-eval", asked, sampling, tokens, stop)
            for number, one in zip(numbers, asked, strict=True):
                text = str(found[one.key])
                # A SentencePiece model leaves out the first space of what it decodes on its own.
                own = isinstance(self._tokenizer, TokenizerJson)
                texts[number] = text if own else text.removeprefix(" ")
        return [texts[number] for number in range(len(requests))]

    @staticmethod
    def writing(
        settings: dict[str, Any], longest: int, name: str = "a task"
    ) -> tuple[Sampling, int, list[str]]:
        """How a task says that is to be written: the draw, tokens at most, texts before which it
        ends.

        Args:
          longest: sequences of the model.
          name: of the task, for messages.
        """
        given = dict(normalize_gen_kwargs(settings, _WRITTEN))
        tokens, stop = given.pop("max_gen_toks"), [text for text in given.pop("until") if text]
        drawn, temperature = given.pop("do_sample"), given.pop("temperature", 0.0)
        # As transformers draws where nothing is said.
        top_k, top_p = given.pop("top_k", 50) or 0, given.pop("top_p", 1.0)
        if given:
            names = ", ".join(given)
            raise UserError(f"benchmark.tasks: {name} sets {names}, which generation does not know")
        if tokens >= longest:
            raise UserError(
                f"benchmark.tasks: {name} writes {tokens} tokens, but the model was trained on"
                f" sequences of {longest}"
            )
        sampling = Sampling(temperature, top_k, top_p) if drawn else GREEDY
        sampling.check()
        return sampling, tokens, stop
