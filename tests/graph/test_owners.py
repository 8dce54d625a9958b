import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singe.graph.claims import Claims, StoredTensor
from singe.graph.mirrors import NOBODY
from singe.graph.owners import Owners


def written_and_read(count):
    """Owners of one weight's rows, all of them read by the columns of another."""
    owners = Owners()
    claims = Claims(owners)
    rows = claims.rows(StoredTensor("a.weight", (count,)), 0)
    claims.claim("b.weight", 1, rows, "reads")
    return owners, claims, rows


def neurons(claims, count):
    """index -> (group, neuron) of a.weight's rows."""
    place = {}
    for group in claims.groups({}):
        for index, neuron in enumerate(group.written("a.weight").neuron.tolist()):
            if neuron >= 0:
                assert index not in place
                place[index] = (group.name, neuron)
    assert sorted(place) == list(range(count))
    return place


indices = st.integers(0, 23)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(indices, indices), min_size=1, max_size=8), max_size=6))
def test_rows_are_one_neuron_exactly_if_a_chain_of_unions_connects_them(calls):
    owners, claims, rows = written_and_read(24)
    component = list(range(24))
    for pairs in calls:
        a, b = torch.tensor(pairs).T
        owners.unite(rows[a], rows[b])
        for i, j in pairs:
            component = [component[i] if c == component[j] else c for c in component]
    place = neurons(claims, 24)
    assert all((place[i] == place[j]) == (component[i] == component[j]) for i in range(24) for j in range(24))
    for group in claims.groups({}):
        firsts = [group.written("a.weight").neuron.tolist().index(n) for n in range(group.size)]
        assert firsts == sorted(firsts), "neurons are ordered by their first row"
        counts = group.written("a.weight").neuron.bincount() if -1 not in group.written("a.weight").neuron else None
        assert counts is None or len(counts.unique()) == 1


def test_nobody_unites_with_nobody():
    owners, claims, rows = written_and_read(4)
    padded = torch.tensor([NOBODY, NOBODY, *rows[2:].tolist()])
    united = owners.unite(padded, rows)
    assert torch.equal(united, rows)
    owners.unite(torch.tensor([NOBODY, NOBODY]), rows[[0, 3]])
    assert len(set(neurons(claims, 4).values())) == 4


def test_padding_never_stands_for_its_axis():
    owners, claims, rows = written_and_read(3)
    picture = rows.view(3, 1, 1).expand(3, 2, 2).clone()
    picture[:, 0, :] = NOBODY
    assert torch.equal(owners.channels(picture, 0), rows)
    claims.claim("c.weight", 1, torch.tensor([NOBODY, *rows.tolist()]), "reads")
    (group,) = claims.groups({})
    assert group.read("c.weight").neuron.tolist() == [-1, 0, 1, 2]


def test_what_differs_off_the_channel_axis_becomes_one_neuron():
    owners, claims, rows = written_and_read(4)
    owners.channels(rows.view(2, 2), 1)  # [[0, 1], [2, 3]]: 0 with 2, 1 with 3
    place = neurons(claims, 4)
    assert place[0] == place[2] != place[1] == place[3]


def test_the_first_reason_is_the_one_given():
    owners, claims, rows = written_and_read(3)
    owners.freeze(rows[:1], "first")
    owners.freeze(rows[:2], "second")
    claims.freeze(StoredTensor("b.weight", (3, 3)), "third")
    assert [(g.size, g.frozen) for g in claims.groups({})] == [(1, "first"), (1, "second"), (1, "third")]


def test_freezing_a_neuron_freezes_all_that_it_is_united_with():
    owners, claims, rows = written_and_read(4)
    owners.freeze(rows[3:], "fixed")
    owners.unite(rows[:1], rows[3:])
    assert {(g.size, g.written("a.weight").multiplicity, g.frozen) for g in claims.groups({})} == {
        (1, 2, "fixed"),
        (2, 1, None),
    }


def test_groups_of_one_writer_get_names_of_their_own():
    claims = Claims(Owners())
    rows = claims.rows(StoredTensor("a.weight", (5,)), 0)
    claims.claim("b.weight", 1, rows[:2], "reads")
    claims.claim("c.weight", 1, rows[2:], "reads")
    assert [(g.name, g.size) for g in claims.groups({})] == [("a", 2), ("a#2", 3)]


def test_rows_may_belong_to_neurons_that_another_weight_writes():
    _, claims, rows = written_and_read(3)
    claims.rows_of("d.weight", 0, rows.repeat_interleave(2))
    (group,) = claims.groups({})
    assert group.writers == ("a.weight", "d.weight")
    assert group.rows("d.weight").tolist() == [[0, 1], [2, 3], [4, 5]]


def test_neurons_that_one_row_belongs_to_are_one():
    _, claims, rows = written_and_read(4)
    claims.rows_of("d.weight", 0, rows[:2])
    claims.rows_of("d.weight", 0, rows[2:])
    (group,) = claims.groups({})
    assert group.size == 2 and group.rows("a.weight").tolist() == [[0, 2], [1, 3]]


def test_places_of_equal_parts_are_one_neuron():
    owners, claims, rows = written_and_read(6)
    assert torch.equal(owners.unite_parts(rows, 3), rows[:2])
    place = neurons(claims, 6)
    assert place[0] == place[2] == place[4] != place[1] == place[3] == place[5]
    assert torch.equal(owners.unite_parts(rows, 1), rows)
