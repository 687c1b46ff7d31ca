"""Grammars that come from clients, checked beside the event loop before anything is generated.

One thread checks one grammar at a time: a hostile one takes a second or two at most, of this thread
alone. Those that were found good are known again for a while: agents send the same one every turn.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import final

from aiohttp import web

from memserve.grammar import GrammarError, check_grammar, deep_thread
from memserve.openai.forms import AnswerForm

MAX_KNOWN = 4096
"""Digests of good grammars that are kept."""


@final
class GrammarChecker:
    """Checks the form of answers; for one event loop."""

    def __init__(self) -> None:
        self._thread = deep_thread()
        self._good: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, form: AnswerForm) -> None:
        """Raise `InvalidRequest` for a grammar that no worker would take."""
        digest = hashlib.blake2b(form.grammar.encode(), digest_size=32).digest()
        if digest not in self._good:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, check_grammar, form.grammar)
            except GrammarError as error:
                raise form.refusal(str(error)) from None
            self._good[digest] = None
            if len(self._good) > MAX_KNOWN:
                self._good.popitem(last=False)
        self._good.move_to_end(digest)

    def close(self) -> None:
        """Check no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


CHECKER = web.AppKey("CHECKER", GrammarChecker)


async def run_checker(app: web.Application) -> AsyncIterator[None]:
    """Cleanup context: the thread that checks grammars."""
    checker = GrammarChecker()
    app[CHECKER] = checker
    yield
    checker.close()
