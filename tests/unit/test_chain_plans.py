"""Who feeds whom when links are broken and hosts far behind, who is waited for, and how many must be complete."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import UsageError
from backhaul.model.fan_out import SENDER
from backhaul.planning import roster
from backhaul.planning.chain import LINK_PATIENCE, Position, Route, may_join, route, stalled

pytestmark = pytest.mark.unit

orders = st.permutations(range(7)).flatmap(lambda order: st.integers(0, 7).map(lambda count: list(order)[:count]))
links = st.frozensets(st.tuples(st.integers(-1, 6), st.integers(0, 6)), max_size=25)
some = st.frozensets(st.integers(0, 6), max_size=3)


def fed(feeds: Route) -> list[tuple[int, int]]:
    return [(node, successor) for node, successors in feeds.items() for successor in successors]


@given(orders, links, some)
def test_everybody_is_fed_once_and_by_way_of_the_sender(
    order: list[int], broken: frozenset[tuple[int, int]], apart: frozenset[int]
) -> None:
    feeds = route(order, broken, apart)
    assert set(feeds) == {SENDER, *order}
    assert sorted(successor for _, successor in fed(feeds)) == sorted(order)
    reached, todo = set(), [SENDER]
    while todo:
        node = todo.pop()
        assert node not in reached
        reached.add(node)
        todo += feeds[node]
    assert reached == {SENDER, *order}
    assert all(len(successors) <= 1 for node, successors in feeds.items() if node != SENDER)


@given(orders, links, some)
def test_a_broken_link_is_taken_only_where_there_is_no_other_way(
    order: list[int], broken: frozenset[tuple[int, int]], apart: frozenset[int]
) -> None:
    feeds = route(order, broken, apart)
    for node, successor in fed(feeds):
        if successor in apart:
            assert node == SENDER
            assert feeds[successor] == ()
        elif (node, successor) in broken:
            assert (SENDER, successor) in broken


@given(orders, some)
def test_without_trouble_it_is_the_order(order: list[int], apart: frozenset[int]) -> None:
    chained = [node for node in order if node not in apart]
    expected = [*itertools.pairwise([SENDER, *chained]), *((SENDER, node) for node in order if node in apart)]
    assert sorted(fed(route(order, (), apart))) == sorted(expected)


@given(orders.filter(lambda order: len(order) > 1), st.data())
def test_one_broken_link_is_no_reason_for_a_second_one_from_the_sender(order: list[int], data: st.DataObject) -> None:
    """With each of the others reachable from everywhere there is a chain; and the sender's line is what is dear."""
    broken = data.draw(st.sampled_from(list(itertools.pairwise([SENDER, *order]))))
    feeds = route(order, {broken})
    assert broken not in fed(feeds)
    if len(order) > 1 and not (len(order) == 1 and broken[0] == SENDER):
        assert len(feeds[SENDER]) == 1


@given(orders, links, st.data())
def test_when_one_leaves_the_others_keep_their_order(
    order: list[int], broken: frozenset[tuple[int, int]], data: st.DataObject
) -> None:
    if order:
        left = data.draw(st.sampled_from(order))
        order.remove(left)
    feeds, path = route(order, ()), []
    node = SENDER
    while feeds[node]:
        (node,) = feeds[node]
        path.append(node)
    assert path == order
    # The same question has the same answer: nobody is told of a route that changes back and forth.
    assert route(order, broken) == route(order, broken)


positions = st.builds(
    Position,
    next=st.integers(0, 100),
    start=st.integers(0, 100),
    idle=st.sampled_from([0.0, LINK_PATIENCE / 2, LINK_PATIENCE, 60.0]),
    blocked=st.booleans(),
)


@given(orders, links, some, st.lists(positions, min_size=7, max_size=7), st.integers(0, 120))
def test_a_link_is_given_up_only_if_there_is_something_to_pass_and_room_for_it(
    order: list[int],
    broken: frozenset[tuple[int, int]],
    apart: frozenset[int],
    where: list[Position],
    end: int,
) -> None:
    feeds = route(order, broken, apart)
    found = stalled(feeds, dict(enumerate(where)), end)
    for link in fed(feeds):
        source, target = link
        have = end if source == SENDER else where[source].next
        due = have > where[target].next and not where[target].blocked and where[target].idle >= LINK_PATIENCE
        assert (link in found) == due


@given(positions, positions)
def test_whoever_joins_the_chain_finds_there_what_it_wants(late: Position, tail: Position) -> None:
    if tail.start <= tail.next and may_join(late, tail):
        assert late.next >= tail.start
    if late.next >= tail.next:
        assert may_join(late, tail)


# -- who is waited for ---------------------------------------------------------------------------------------

seconds = st.floats(0, 1000)


@given(st.integers(0, 8), st.integers(1, 8), st.integers(1, 8), st.booleans(), seconds, seconds, seconds, seconds)
def test_it_begins_with_enough_and_never_waits_for_ever(
    ready: int,
    expected: int,
    required: int,
    named: bool,
    waited: float,
    since_first: float,
    min_wait: float,
    max_wait: float,
) -> None:
    required = min(required, expected)
    decision = roster.may_begin(
        ready=ready,
        expected=expected,
        required=required,
        named=named,
        waited=waited,
        since_first=since_first,
        min_wait=min_wait,
        max_wait=max_wait,
    )
    if decision == roster.BEGIN:
        assert ready >= required
        assert ready >= expected or waited >= max_wait
        assert named or since_first >= min_wait or waited >= max_wait
    elif decision == roster.GIVE_UP:
        assert ready < required
        assert waited >= max_wait
    else:
        assert waited < max_wait
        assert ready < expected or (not named and since_first < min_wait)


@given(st.integers(1, 100), st.integers(-5, 105))
def test_a_requirement_is_all_or_a_number_that_can_be(expected: int, number: int) -> None:
    assert roster.required("all", expected) == expected
    if 1 <= number <= expected:
        assert roster.required(str(number), expected) == number
    else:
        with pytest.raises(UsageError, match="--require"):
            roster.required(str(number), expected)


@given(st.text(max_size=5).filter(lambda text: text != "all"))
def test_a_requirement_that_is_no_number(text: str) -> None:
    try:
        assert 1 <= roster.required(text, 50) <= 50
    except UsageError as error:
        assert "--require" in error.what
