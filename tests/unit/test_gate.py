"""Who may connect while nobody knows who it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distexec import gate
from distexec.gate import Gate, source_of


def test_sources() -> None:
    """An IPv4 address is a source, an IPv6 network of 64 bits is one, and a mapped address is the IPv4 one."""
    assert source_of("10.0.0.7") == source_of("::ffff:10.0.0.7") == "10.0.0.7"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:2") != source_of("2001:db8:0:1::1")
    assert source_of("fe80::1%eth0") == source_of("fe80::2")


def test_strangers_have_a_limit_and_places_come_back() -> None:
    """No more than the limit at once, from wherever; who leaves makes room."""
    door = Gate()
    for number in range(gate.MAX_STRANGERS):
        assert door.admit(f"s{number}", 0.0) == ""
    assert "not proved" in door.admit("late", 0.0)
    door.leave("s0", 1.0, is_proved=False)
    assert door.admit("late", 1.0) == ""


def test_one_source_cannot_take_every_place() -> None:
    """A flood from one source is refused while others still get in."""
    door = Gate()
    admitted = sum(not door.admit("flood", 0.0) for _ in range(1000))
    assert admitted == gate.MAX_STRANGERS_OF_ONE
    assert door.admit("honest", 0.0) == ""


def test_wasted_connections_run_out_and_come_back() -> None:
    """Who never proves anything gets its burst, then the refill."""
    door = Gate()

    def waste(now: float) -> int:
        count = 0
        while not door.admit("guesser", now):
            door.leave("guesser", now, is_proved=False)
            count += 1
        return count

    assert waste(0.0) == gate.BURST
    assert waste(1.0) == gate.REFILL_PER_S
    assert waste(1.0) == 0
    assert waste(1e6) == gate.BURST


def test_proving_costs_nothing() -> None:
    """An honest source may come as often as it likes."""
    door = Gate()
    for _ in range(1000):
        assert door.admit("honest", 0.0) == ""
        door.leave("honest", 0.0, is_proved=True)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.floats(0, 2)), max_size=300))
def test_counts_stay_true(steps: list[tuple[int, bool, float]]) -> None:
    """Whatever comes and goes, the count of strangers is that of the admitted who have not left, and within the
    limits."""
    door, inside, now = Gate(), [], 0.0
    for number, is_coming, pause in steps:
        now += pause
        if is_coming:
            if not door.admit(str(number), now):
                inside.append(str(number))
        elif inside:
            door.leave(inside.pop(number % len(inside)), now, is_proved=bool(number % 2))
        assert sum(door.strangers.values()) == len(inside) <= gate.MAX_STRANGERS
        assert max(door.strangers.values(), default=0) <= gate.MAX_STRANGERS_OF_ONE


def test_memory_is_bounded() -> None:
    """A million sources do not make the gate grow beyond its limit."""
    door = Gate()
    for number in range(3 * gate.MAX_SOURCES):
        assert door.admit(str(number), 0.0) == ""
        door.leave(str(number), 0.0, is_proved=False)
    assert len(door._buckets) == gate.MAX_SOURCES
