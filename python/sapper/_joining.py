"""Makes a pump of two endpoints: both are taken, or none.

Not here: what a single endpoint may be (:mod:`sapper._takeover`), what a pump does
(:mod:`sapper.pump`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sapper import _arguments, _native
from sapper._life import Callback, ErrorCallback, Life, Policy
from sapper._loop import current_loop, post_of
from sapper._options import config_error
from sapper._takeover import Taken, becomes_ours, descriptors, must_be_open, take
from sapper.pump_options import PumpOptions, check_policy

if TYPE_CHECKING:
    from sapper.pump import Pump

__all__ = ["build", "take_both"]

P = TypeVar("P", bound="Pump")


def take_both(first: object, first_name: str, second: object, second_name: str) -> tuple[Taken, Taken]:
    """Takes two endpoints, or none."""
    for number in (numbers := descriptors(second, second_name)):
        # The duplicate of the first would get a closed one's number, and be taken for the second.
        must_be_open(number, second_name)
    if numbers and descriptors(first, first_name)[:1] == numbers[:1]:
        raise config_error(second_name, f"is read from descriptor {numbers[0]}, as {first_name} is", "same")
    if (owned := becomes_ours(first)) is not None and owned is becomes_ours(second):
        raise config_error(second_name, f"is the same object as {first_name}: it can be taken once", "same")
    one = take(first, first_name)
    try:
        return one, take(second, second_name)
    except BaseException:
        one.give_back()
        raise


def build(
    kind: type[P],
    transport: tuple[Taken, _native.TlsSide | None, bytes],
    sink: tuple[Taken, _native.TlsSide | None],
    options: PumpOptions,
    *,
    on_error: ErrorCallback | None,
    on_close: Callback | None,
    policy: Policy | None = None,
    early: tuple[bytes, bool] | None = None,
) -> P:
    """Makes the native object and takes both endpoints for good, or gives both back."""
    network, network_tls, initial_data = transport
    inner, inner_tls = sink
    life: Life | None = None
    native: _native.Bridge | None = None
    try:
        _arguments.callback(on_error, "on_error")
        _arguments.callback(on_close, "on_close")
        check_policy(options, policy)
        life = Life(
            post_of(current_loop()),
            on_error=on_error,
            on_close=on_close,
            policy=policy,
            policy_deadline=options.policy_timeout,
        )
        native = _native.Bridge(
            network.native,
            network_tls,
            # The caller read first: what a reader holds came later.
            initial_data + network.initial_data,
            inner.native,
            inner_tls,
            inner.initial_data,
            options.native,
            policy is not None,
            early,
            life.subscribed(),
            life.key,
        )
        # What may fail comes first, while the other one can still be given back.
        first, last = (inner, network) if inner.asks and not network.asks else (network, inner)
        first.commit()
        last.commit()
    except BaseException:
        native = None  # whoever keeps the exception keeps this frame
        if life is not None:
            life.cancel()
        inner.give_back()
        network.give_back()
        raise
    life.at_end(network.end, inner.end)
    tls = network_tls is not None or inner_tls is not None
    return kind(native, life, network, inner, options, tls=tls)
