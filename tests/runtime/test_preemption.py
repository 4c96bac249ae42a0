import signal

import pytest

from jaxlm.runtime.preemption import stop_on_signal, stop_together


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_stops_and_the_second_acts_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    seen = []
    signal.signal(number, lambda *_: seen.append(number))
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(number)
            assert stop.is_set()
            assert not seen
            signal.raise_signal(number)
            assert seen == [number]
    finally:
        signal.signal(number, before)


def test_alone_a_run_stops_before_the_next_step() -> None:
    with stop_together() as must_stop:
        assert not must_stop(3)
        signal.raise_signal(signal.SIGTERM)
        assert must_stop(4)
