"""What becomes of an object that runs until somebody ends it, and is dropped: it ends at once and says so.

docs/lifetimes.md has the rule. It needs two things of a class: what is kept for its call-backs must not
keep the object (:func:`subscribe`, weak references in its tasks), and its ``__del__`` calls
:func:`dropped` while it runs.

Not here: what has an end of its own and lives until then (:mod:`sapper._life`).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from sapper import _native
from sapper._loop import Handler, Post
from sapper.errors import SapperError

__all__ = ["dropped", "subscribe"]


def subscribe(post: Post, hear: Handler) -> tuple[_native.Mailbox, int]:
    """A subscription that does not keep the object whose method ``hear`` is.

    Once that is gone, questions get no answer, and the last message ends the subscription.
    """
    owner = weakref.WeakMethod(hear)

    def heard(tag: str, value: Any) -> None:
        hear = owner()
        if hear is not None:
            hear(tag, value)
        elif tag == "question":
            value.give_up()
        elif tag == "closed":
            post.unsubscribe(key)

    mailbox, key = post.subscribe(heard)
    return mailbox, key


def dropped(one: object, end: Callable[[], object]) -> None:
    """For the ``__del__`` of an object that runs, in any thread: ends it, with a ResourceWarning."""
    said = f"unclosed {one!r}"
    with contextlib.suppress(SapperError):
        end()
    # Last: where warnings are errors nothing behind it runs.
    warnings.warn(said, ResourceWarning, source=one, stacklevel=3)
