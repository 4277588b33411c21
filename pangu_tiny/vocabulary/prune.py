"""In which order the pieces of a vocabulary are dropped.

Every method puts all pieces that may go in one order, so that a smaller vocabulary is always a
part of a larger one, and the size is how far one goes along it.

Why `flow` may simply drop the cheapest leaf: if a piece may only go after all that are merged from
it, then what it costs to lose it is fixed: its flow, that is how often the corpus merges it, as a
token of its own or on the way to a longer one. A part flows at least as often as what is made
of it, so that the pieces with the largest flows are closed under taking apart, and no other choice
of as many pieces makes the text shorter, as long as what is taken apart does not merge anew with
its neighbours. (Counting again after each of twelve smaller cuts changed nothing: +2.068 % against
+2.059 % tokens at 24,000 of InternLM's 103,168 pieces.) Only single characters are priced
otherwise, by the bytes that they become.
"""

import heapq
from collections.abc import Callable

import numpy as np

from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.tokenizer import proto
from pangu_tiny.vocabulary.pieces import Vocabulary


def required(vocabulary: Vocabulary, names: list[str]) -> np.ndarray:
    """bool [n], the pieces that no method gives up: marks, bytes and user-defined ones by their
    type, the space, single characters where no bytes stand in for them, and those named."""
    keep = ~vocabulary.merging
    if not vocabulary.byte_fallback:
        keep |= vocabulary.single
    for name in {proto.SPACE, *names} & vocabulary.ids.keys():
        if vocabulary.unreachable[vocabulary.ids[name]]:
            raise UserError(f"keep names {name!r}, which the tokenizer has but never emits")
        keep[vocabulary.ids[name]] = True
    if missing := sorted(set(names) - set(vocabulary.pieces)):
        raise UserError(f"keep names {missing[0]!r}, which is no piece of the tokenizer")
    return keep


def order(method: str, vocabulary: Vocabulary, times: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The ids that may go, the first to go first.

    Args:
      method: one of `METHODS`.
      times: int [n], how often each id was emitted.
      keep: bool [n], what `required` says.
    """
    check_one_of("compress_tokenizer.method", method, METHODS)
    return np.array(METHODS[method](vocabulary, times, keep), int)


def _flow(vocabulary: Vocabulary, times: np.ndarray, keep: np.ndarray) -> list[int]:
    """Repeatedly drops the cheapest leaf (a piece that no kept piece is merged from); its count
    moves to its two parts.

    Ties go to the piece of highest priority: a piece that was frequent where the tokenizer was
    trained, and is rare here, belongs to text of another kind. (Of pieces seen once in 29 MB, the
    sixth with the highest priority was seen 0.13 times in 3 MB held out, the sixth with the lowest
    0.18 times.)
    """
    parts, flow = vocabulary.parts, times.astype(np.int64)
    made_of_it = np.bincount(parts[parts >= 0], minlength=len(parts))
    # A letter that becomes its one byte costs no token, but the row that a big model learned.
    extra = np.maximum(1, vocabulary.split_tokens - 1)

    def entry(i: int) -> tuple[bool, int, float, int]:
        return not vocabulary.unreachable[i], int(flow[i] * extra[i]), -vocabulary.scores[i], i

    leaves = [entry(int(i)) for i in np.flatnonzero((made_of_it == 0) & ~keep)]
    heapq.heapify(leaves)
    gone = []
    while leaves:
        i = heapq.heappop(leaves)[-1]
        gone.append(int(i))
        for part in parts[i][parts[i] >= 0]:
            flow[part] += flow[i]
            made_of_it[part] -= 1
            if not made_of_it[part] and not keep[part]:
                heapq.heappush(leaves, entry(part))
    return gone


def _unused(vocabulary: Vocabulary, times: np.ndarray, keep: np.ndarray) -> list[int]:
    """Repeatedly drops the cheapest piece, whatever is merged from it: where dropped pieces are
    still merged through, a rarely emitted part can go before the whole.

    It costs its times × (the kept pieces that it comes to − 1), and leaves its times to those.
    A cost grows when more goes, and never falls, so that one is looked at again only when its turn
    has come.
    """
    flow = times.astype(np.int64)
    kept = np.ones(len(flow), bool)
    parts = vocabulary.parts

    def comes_to(i: int) -> tuple[list[int], int]:
        """The kept pieces that i is taken apart into, and how many bytes beside them."""
        pieces, lone, todo = [], 0, [i]
        while todo:
            piece = todo.pop()
            if kept[piece] and piece != i:
                pieces.append(piece)
            elif len(text := vocabulary.pieces[piece]) == 1:
                lone += len(text.encode())
            else:
                for part, end in zip(parts[piece], (text[0], text[-1]), strict=True):
                    if part >= 0:
                        todo.append(int(part))
                    else:
                        lone += len(end.encode())
        return pieces, lone

    def entry(i: int) -> tuple[bool, int, float, int]:
        if vocabulary.unreachable[i]:
            return False, 0, -vocabulary.scores[i], i
        pieces, lone = comes_to(i)
        return True, int(flow[i] * max(1, len(pieces) + lone - 1)), -vocabulary.scores[i], i

    candidates = [entry(int(i)) for i in np.flatnonzero(~keep)]
    heapq.heapify(candidates)
    gone = []
    while candidates:
        found = heapq.heappop(candidates)
        i = found[-1]
        if (now := entry(i)) > found:
            heapq.heappush(candidates, now)
            continue
        if not vocabulary.unreachable[i]:
            np.add.at(flow, comes_to(i)[0], flow[i])
        kept[i] = False
        gone.append(i)
    return gone


def _paper(vocabulary: Vocabulary, times: np.ndarray, keep: np.ndarray) -> list[int]:
    """The rule of the paper's script: the least emitted first, ties to the highest id; what looks
    like a special piece, more than two characters in <> or [], stays.

    It ignores how a piece is made, so that frequent pieces are lost with rare ones.
    """
    looks_special = np.array(
        [len(piece) > 2 and piece[0] + piece[-1] in ("<>", "[]") for piece in vocabulary.pieces]
    )
    rarest_first = np.argsort(-times, kind="stable")[::-1]
    return [int(i) for i in rarest_first if not (keep[i] or looks_special[i])]


METHODS: dict[str, Callable[[Vocabulary, np.ndarray, np.ndarray], list[int]]] = {
    "flow": _flow,
    "unused": _unused,
    "paper": _paper,
}
"""flow: no unreachable piece, a plain model. unused: what was dropped stays as an unused piece, and
is merged through; the shortest text. paper: the published rule, for comparison."""
