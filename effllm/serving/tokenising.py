"""A model's tokenizer in a server: short texts at once, long ones in a thread, and bounds on what they may become."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from effllm.errors import EffllmError
from effllm.folder import ModelFolder
from effllm.runtime.tokenizer import Encoding, TextTokenizer
from effllm.serving.refusals import BadInput, QueueFull, TooLong, TooMany
from effllm.serving.served import TOKEN_STATES, ModelInfo, TokenPiece
from effllm.tasks import TASKS, Example

T = TypeVar("T")
Work = Callable[[TextTokenizer, Callable[[], bool]], list[T]]

INLINE_CHARACTERS = 4000
"""Requests with fewer characters are tokenised at once; a thread for the others lets the server go on meanwhile."""
MAX_WINDOWS = 128
"""The most windows that one input may make; 128 of 384 tokens are a passage of some 30,000."""
PLACES = 4
"""The calls of `tell` that one model has under way; they have these places of their own, not the queue's."""
TOLD_TOKENS = 100_000
"""The most tokens that one call of `tell` tells: each is an object here and some 60 bytes of the answer."""
STATE_NUMBERS = 2**24
"""The most numbers that the token states of one request hold: 64 MB, and 200 MB of JSON. 32 texts of 512 tokens with
1,024 numbers each."""


class Tokenising:
    """The tokenizer of a loaded folder. All methods belong to one event loop."""

    def __init__(self, folder: ModelFolder, info: ModelInfo) -> None:
        self._info = info
        self._tokenizer = TextTokenizer.open(folder)
        # A tokenizer is not made for two threads, so that of the thread is another one.
        self._thread_tokenizer = TextTokenizer.open(folder)
        self._tokenizer.max_windows = self._thread_tokenizer.max_windows = MAX_WINDOWS
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tokenise-{info.name}")
        self._telling = 0

    @property
    def telling(self) -> int:
        """The calls of `tell` that are under way."""
        return self._telling

    def close(self) -> None:
        """Drop what waits for the thread; the calls that wait for it are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, examples: Sequence[Example], kind: str, *, truncate: bool) -> list[list[Encoding]]:
        """Return the encodings of each example for a task, or for token states.

        Raises BadInput naming the example that cannot be tokenised, TooLong that with too many windows, or that which
        would be cut where it must not be, TooMany where the token states would hold too many numbers.
        """
        task = TASKS.get(kind, TASKS["feature-extraction"])

        def work(tokenizer: TextTokenizer, given_up: Callable[[], bool]) -> list[list[Encoding]]:
            groups: list[list[Encoding]] = []
            for index, example in itertools.takewhile(lambda _: not given_up(), enumerate(examples)):
                try:
                    groups.append(task.encode(tokenizer, example))
                except OverflowError as error:
                    raise TooLong(f"input {index} {error}", index) from None
                except (UnicodeError, TypeError, ValueError, EffllmError) as error:
                    raise BadInput(f"input {index} cannot be tokenised: {error}", index) from None
            return groups

        characters = sum(
            sum(map(len, e.text)) if isinstance(e.text, tuple) else len(e.text) + len(e.text_pair or "")
            for e in examples
        )
        groups = await self._run(work, characters)
        if not truncate:
            self._refuse_long(groups, kind)
        if kind == TOKEN_STATES:
            self._refuse_many_states(groups)
        return groups

    async def tell(self, texts: Sequence[str]) -> list[list[TokenPiece]]:
        """Return the tokens of each text, not truncated.

        Raises TooLong beyond 100,000 tokens, QueueFull where 4 other calls are under way.
        """

        def work(tokenizer: TextTokenizer, given_up: Callable[[], bool]) -> list[list[TokenPiece]]:
            found, room = list[list[TokenPiece]](), TOLD_TOKENS
            for index, text in itertools.takewhile(lambda _: not given_up(), enumerate(texts)):
                try:
                    pieces = tokenizer.pieces(text, room)
                except OverflowError:
                    message = f"the texts up to input {index} have more than {TOLD_TOKENS} tokens"
                    raise TooLong(message, index) from None
                room -= len(pieces)
                found.append([TokenPiece(*piece) for piece in pieces])
            return found

        if self._telling >= PLACES:
            raise QueueFull(f"{self._telling} requests tokenise with {self._info.name} already", 1.0)
        self._telling += 1
        try:
            return await self._run(work, sum(map(len, texts)))
        finally:
            self._telling -= 1

    async def _run(self, work: Work[T], characters: int) -> list[T]:
        """Run `work` here, or where there is much of it in the thread; it is told when nobody waits any more."""
        if characters < INLINE_CHARACTERS:
            return work(self._tokenizer, lambda: False)
        over = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, work, self._thread_tokenizer, over.is_set
            )
        finally:
            over.set()

    def _refuse_long(self, groups: Sequence[Sequence[Encoding]], kind: str) -> None:
        for index, group in enumerate(groups):
            lost = sum(e.truncated_tokens for e in group)
            if lost:
                limit, name = self._info.max_length, self._info.name
                message = f"input {index} has {limit + lost} tokens, {name} takes {limit}"
                if kind == "question-answering":  # a passage is read in windows, of which a question takes half at most
                    message = f"the question of input {index} has {lost} tokens more than {name} takes"
                raise TooLong(message, index)

    def _refuse_many_states(self, groups: Sequence[Sequence[Encoding]]) -> None:
        tokens, size = sum(len(e) for group in groups for e in group), self._info.embedding_size
        if tokens * size > STATE_NUMBERS:
            most = STATE_NUMBERS // size
            message = f"the inputs have {tokens} tokens, more than the {most} whose vectors fit into one answer"
            raise TooMany(f"{message}; send fewer at once")
