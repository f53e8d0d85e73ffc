"""A few spoiled checkpoints: each loads as what its files say, or is refused by name. ``make spoil`` runs many."""

import pytest

from spoiled.case import SPOILERS, generate
from spoiled.healthy import KINDS, healthy
from spoiled.run import BAD, GOOD, Loaded, inspect, is_named, judge, load
from spoiled.theirs import ALLOWED
from spoiled.work import run, usual

COUNT = 60


def test_spoiled_checkpoints_load_as_they_are_or_are_refused():
    results = list(run(range(COUNT)))
    bad = [f"{r.outcome}: seed {r.seed}, {r.kind}, {' + '.join(r.spoilers)}: {r.detail}" for r in results]
    assert not [text for text, result in zip(bad, results, strict=True) if result.outcome in BAD], "\n".join(bad)
    assert {"equal", "refused"} <= {result.outcome for result in results} <= set(GOOD)


@pytest.mark.parametrize("kind", ["modelopt-mixed", "compressed-tensors", "mlx"])
def test_healthy_ones_are_equal(kind):
    case = next(case for case in map(generate, range(200)) if case.kind == kind and not case.parts.values)
    folder = healthy(kind).folder
    assert judge(case, load(folder), inspect(folder), usual(kind)) == ("equal", "")


def test_a_seed_gives_the_same_again(tmp_path):
    for seed in range(8):
        for name in ("a", "b"):
            (tmp_path / f"{seed}{name}").mkdir()
            generate(seed).parts.write(tmp_path / f"{seed}{name}")
        files = [
            {path.name: path.is_file() and path.read_bytes() for path in (tmp_path / f"{seed}{name}").iterdir()}
            for name in ("a", "b")
        ]
        assert files[0] == files[1] and len(files[0]) >= 3


def test_every_spoiler_and_every_kind_is_drawn():
    cases = [generate(seed) for seed in range(220)]
    assert {name for case in cases for name in case.spoilers} == set(SPOILERS)
    assert {case.kind for case in cases} == set(KINDS)


def test_what_is_bad_is_told():
    from marlin_w4a16.checkpoints.files import CheckpointError

    case = next(case for case in map(generate, range(400)) if case.spoilers == ("tensors: lost",))
    lost = case.words[0][0]
    right = CheckpointError(f"model.safetensors: {lost}: found no such tensor, expected one")
    assert judge(case, Loaded(error=right), 1, ())[0] == "refused"
    assert judge(case, Loaded(error=right), 0, ())[0] == "disagrees"
    assert judge(case, Loaded(error=CheckpointError("something is wrong")), 1, ())[0] == "unnamed"
    assert not is_named("model.safetensors: x.y: found no such tensor, expected one", case)
    assert judge(case, Loaded(error=KeyError(lost)), 1, ())[0] == "raw"
    assert judge(case, Loaded(error=ALLOWED[0][0]("something")), 1, ())[0] == "raw"
    healthy_logits = load(case.parts.healthy.folder).logits
    assert judge(case, Loaded(healthy_logits), 0, ())[0] == "equal"
    assert judge(case, Loaded(healthy_logits, ("a note",)), 0, ())[0] == "noted"
    assert judge(case, Loaded(healthy_logits), 1, ())[0] == "disagrees"
    assert judge(case, Loaded(healthy_logits * 1.001), 0, ("a note",))[0] == "silent"
    assert judge(case, Loaded(healthy_logits * float("nan")), 0, ())[0] == "silent"
