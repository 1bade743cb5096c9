"""Pre-shared keys that a program is asked for, one client at a time.

Native code asks within a handshake, on a thread that may block, and waits no longer than the deadline.

Not here: keys that are known beforehand (:meth:`sapper.tls.Credentials.psks`).
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable

from sapper import _native
from sapper._loop import Post, current_loop, post_of

__all__ = ["PskAnswers", "PskFinder"]

logger = logging.getLogger("sapper")

#: Gives the key of an identity: bytes, hexadecimal text, or ``None`` where there is no such client.
PskFinder = Callable[[bytes], bytes | str | Awaitable[bytes | str | None] | None]


class PskAnswers:
    """Answers the questions of one configuration.

    Whoever uses the configuration keeps this alive; without it no client is found. The post does not: what
    a program is asked by may refer to its event loop, which would then never be collected.
    """

    def __init__(self, finder: PskFinder, timeout: float) -> None:
        self._finder = finder
        self._timeout = timeout
        self._post = post_of(current_loop())
        heard = _Heard(self, self._post)
        mailbox, heard.key = self._post.subscribe(heard)
        self._key = heard.key
        self._mailbox: _native.Mailbox | None = mailbox

    def taken(self) -> tuple[_native.Mailbox, int, float]:
        """Where the native side asks. To be asked for once."""
        mailbox, self._mailbox = self._mailbox, None
        assert mailbox is not None  # noqa: S101 - a configuration is made once
        return mailbox, self._key, self._timeout

    def cancel(self) -> None:
        """The configuration was not made after all."""
        self._mailbox = None
        self._post.unsubscribe(self._key)

    def must_answer_here(self) -> bool:
        """Whether questions are answered by this very thread, which must therefore not block."""
        return self._post.is_here()

    def ask(self, question: _native.Question) -> None:
        """Asks the program, and answers."""
        try:
            answer = self._finder(question.subject["identity"])
        except BaseException as error:
            question.answer_key(None)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            logger.exception("sapper: a look-up of a pre-shared key failed, which means there is none")
            return
        if isinstance(answer, Awaitable):
            self._post.run(self._answer_later, question, answer)
        else:
            question.answer_key(_key(answer))

    async def _answer_later(self, question: _native.Question, answer: Awaitable[bytes | str | None]) -> None:
        key: bytes | None = None
        try:
            async with asyncio.timeout(self._timeout):
                key = _key(await answer)
        except TimeoutError:
            logger.warning("sapper: a look-up of a pre-shared key gave nothing within %s s", self._timeout)
        except Exception:
            logger.exception("sapper: a look-up of a pre-shared key failed, which means there is none")
        finally:
            question.answer_key(key)


class _Heard:
    """What the post keeps."""

    def __init__(self, answers: PskAnswers, post: Post) -> None:
        self.key = 0
        self._answers = weakref.ref(answers)
        self._post = post

    def __call__(self, tag: str, value: object) -> None:
        if tag == "released":
            self._post.unsubscribe(self.key)
        elif isinstance(value, _native.Question):
            answers = self._answers()
            if answers is None:
                value.answer_key(None)
            else:
                answers.ask(value)


def _key(answer: object) -> bytes | None:
    if answer is None or isinstance(answer, bytes):
        return answer
    if isinstance(answer, bytearray | memoryview):
        return bytes(answer)
    if isinstance(answer, str):
        try:
            return bytes.fromhex(answer)
        except ValueError:
            logger.error("sapper: a look-up gave a pre-shared key as text that is not hexadecimal")
            return None
    logger.error("sapper: a look-up gave %s, not a pre-shared key", type(answer).__name__)
    return None
