"""Which of a checkpoint's tensors become those of a model, or why it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ray_soup.errors import IngredientError
from ray_soup.io.binding import Reading, best_reading
from ray_soup.io.check import check_fits
from ray_soup.io.formats import TensorInfo
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.names import PREFIXES, WRAPPERS, unwrapped

BARE = ("a.weight", "a.bias", "b.weight", "b.bias")
MODEL = set(BARE)


def infos(names: Iterable[str]) -> dict[str, TensorInfo]:
    """Tensors that can be told apart: the n-th name has the shape [n + 1]."""
    return {name: TensorInfo("float32", (n + 1,), 0, 4 * n) for n, name in enumerate(names)}


def infos_of(names: Iterable[str]) -> dict[str, TensorInfo]:
    """The same, but what belongs to a metric or counts steps has the dtype and shape that it has there."""
    counts = {"tp", "fn", "confmat", "weight", "initted", "step"}
    return {
        name: TensorInfo("int64", (), 0, 4 * n) if name in METRICS or name in counts else info
        for n, (name, info) in enumerate(infos(names).items())
    }


def under(*prefixes: str, names: Iterable[str] = BARE) -> list[str]:
    return [prefix + name for prefix in prefixes for name in names]


def read(
    names: Iterable[str] | Mapping[str, Any], ignore: Iterable[str] = (), tied: Mapping[str, str] | None = None
) -> tuple[dict[str, str], Reading]:
    """Return the name in the file of each tensor in use, and the whole reading."""
    containers = names if isinstance(names, Mapping) else {"": names}
    numbers = itertools.count(1)
    given = {
        key: {
            n: TensorInfo(some[n].dtype_name, some[n].shape, 0, next(numbers))
            if isinstance(some, Mapping)
            else TensorInfo("float32", (place := next(numbers),), 0, place)
            for n in some
        }
        for key, some in containers.items()
    }
    reading = best_reading(given, MODEL, tied or {}, ignore)
    places = {info.place: f"{key}:{name}" if key else name for key, some in given.items() for name, info in some.items()}
    return {name: places[info.place] for name, info in reading.tensors.items()}, reading


def fits(found: Mapping[str, str], reading: Reading) -> bool:
    return set(found) == MODEL and not reading.unclear


METRICS = ("train_acc.tp", "train_acc.fn", "val_metrics.f1.confmat", "metrics.MeanMetric.weight")
AT_TOP = ("criterion.weight", "loss_fn.pos_weight", "n_averaged")


@pytest.mark.parametrize(
    ("names", "prefix", "left_out"),
    [
        (under(""), "", ()),
        (under("module."), "module.", ()),
        (under("module._orig_mod."), "module._orig_mod.", ()),
        (["n_averaged", *under("module.")], "module.", ("n_averaged",)),  # torch.optim.swa_utils.AveragedModel
        ([*under("model."), "criterion.weight"], "model.", ("criterion.weight",)),
        (["loss.w", *under("module.model.")], "module.model.", ("loss.w",)),
        ([*under("model."), *under("teacher.", "ema_model.")], "model.", tuple(under("teacher.", "ema_model."))),
        ([*under("model."), "teacher.encoder.weight"], "model.", ("teacher.encoder.weight",)),  # a larger teacher
        (under("net."), "net.", ()),  # any prefix, if nothing else is in the file
        (under("model.net."), "model.net.", ()),
        (under("backbone.model."), "backbone.model.", ()),
        (under("net._orig_mod."), "net._orig_mod.", ()),  # a compiled submodule
        (under("net.module._fsdp_wrapped_module."), "net.module._fsdp_wrapped_module.", ()),
        ([*under("net."), "criterion.weight"], "net.", ("criterion.weight",)),
        ([*under("net._orig_mod."), *AT_TOP, *METRICS], "net._orig_mod.", (*AT_TOP, *METRICS)),
        ([*under("model."), *AT_TOP, *METRICS], "model.", (*AT_TOP, *METRICS)),
        ([*under(""), *AT_TOP, *METRICS], "", (*AT_TOP, *METRICS)),
        ([*under("net."), "net.loss.weight"], "net.", ("loss.weight",)),
        ([*under("net."), *under("ema_model.module.")], "net.", tuple(under("ema_model.module."))),
        ([*under("net."), *under("net.ema.")], "net.", tuple(under("ema."))),
        ([*under("net."), "ema.aweight", "ema.bbias"], "net.", ("ema.aweight", "ema.bbias")),  # names without their dots
        ([*under(""), *under("ema.")], "", tuple(under("ema."))),
        ([*under(""), *under("teacher.")], "", tuple(under("teacher."))),
        ([*under("ema.ema_model."), "initted", "step"], "ema.ema_model.", ("initted", "step")),
    ],
)
def test_a_model_under_one_prefix_is_found(names: list[str], prefix: str, left_out: tuple[str, ...]) -> None:
    found, reading = read({"": infos_of(names)})
    assert fits(found, reading)
    assert found == {name: prefix + name for name in MODEL}
    assert reading.left_out == left_out
    assert bool(reading.remarks) == bool(left_out)


@pytest.mark.parametrize(
    "names",
    [
        [*under(""), "c.weight"],  # nothing shows that it is not needed
        [*under(""), *under("model.")],
        [*under("model."), "model.c.weight"],
        [*under("model."), *under("module.")],
        [*under("model."), *under("module.model.")],
        [*under("model."), *under("net.")],
        [*under("net."), *under("net._orig_mod.")],
        under("student.", "teacher."),
        [*under("net."), *under("teacher.")],
        under("ema.", "swa_model."),
        under("ema.ema_model.", "ema.online_model."),
        under("model.")[:2],
        [*under("module."), "b.weight"],  # which one is it?
        [*under("module.")[:3], "b.weight", "b.bias"],
        ["module.a.weight", "a.weight", "a.bias", "model.b.weight", "b.bias"],
        [*under("net."), "a.weight"],
        [],
        ["module.", "model.model.", "."],
    ],
)
def test_what_is_incomplete_or_ambiguous_does_not_fit(names: list[str]) -> None:
    assert not fits(*read(names))


@pytest.mark.parametrize("prefix", ["", "model.", "net._orig_mod."])
@pytest.mark.parametrize(
    ("beside", "shape", "dtype"),
    [
        ("scale", (), "float32"),  # may multiply the logits, as may all below
        ("temperature", (1,), "float32"),
        ("class_weights", (4,), "float32"),
        ("criterion.logit_scale", (), "float32"),
        ("loss.bias", (4,), "float32"),
        ("criterion.weight", (4, 8), "float32"),  # ArcFace: the classifier is in the loss
        ("loss_head.weight", (4,), "float32"),
        ("metrics.fid.inception.conv.weight", (4, 3, 3, 3), "float32"),
        ("train_acc.head.weight", (4,), "float32"),
        ("metric_head.weight", (1,), "float32"),
        ("step", (1,), "float32"),
        ("head.step", (), "int64"),
        ("discriminator.a.weight", (1,), "float32"),
        ("teacher_forcing.weight", (1,), "float32"),
        ("ema_gate.weight", (1,), "float32"),
    ],
)
def test_what_could_belong_to_the_computation_is_not_left_out(
    prefix: str, beside: str, shape: tuple[int, ...], dtype: str
) -> None:
    given = {**infos(under(prefix)), beside: TensorInfo(dtype, shape, 0, 99)}
    reading = best_reading({"": given}, MODEL, {})
    assert set(reading.tensors) == {*MODEL, beside}
    assert best_reading({"": given}, MODEL, {}, [beside]).left_out == (beside,)


@pytest.mark.parametrize(
    ("names", "ignore", "prefix"),
    [
        ([*under(""), "c.weight"], ["c.*"], ""),
        ([*under(""), *under("model.")], ["model.*"], ""),
        ([*under("model."), "model.c.weight"], ["c.*"], "model."),
        ([*under("model."), "model.c.weight"], ["model.c.*"], "model."),
        ([*under("model."), *under("module.")], ["module.*"], "model."),
        (under("student.", "teacher."), ["teacher.*"], "student."),
        (under("student.", "teacher."), ["student.*"], "teacher."),
        ([*under("model."), *under("ema_model.")], ["model.*"], "ema_model."),
        ([*under("net."), "criterion.weight"], ["criterion.*"], "net."),
        (under(""), ["*"], ""),  # a pattern never removes what the model has
    ],
)
def test_the_patterns_of_ignore_decide(names: list[str], ignore: list[str], prefix: str) -> None:
    found, reading = read(names, ignore)
    assert fits(found, reading)
    assert found == {name: prefix + name for name in MODEL}


def test_a_choice_that_ignore_made_is_part_of_the_identity(tmp_path: Path) -> None:
    """Otherwise directions and evaluations of the teacher would be taken from the cache for the student."""
    tensors = {name: torch.full((1,), float(n)) for n, name in enumerate(under("student.", "teacher."))}
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({f"model.{name}": torch.ones(1) for name in BARE}, tmp_path / "b.pt")
    opened, other = (open_ingredient(str(tmp_path / name)) for name in ("a.pt", "b.pt"))
    student, teacher = (opened.bind(MODEL, {}, [f"{name}.*"]) for name in ("teacher", "student"))
    assert student.read("a.weight").tolist() != teacher.read("a.weight").tolist()
    assert (
        len({str(i.identity) for i in (opened, student, teacher)})
        == len({i.within for i in (student, teacher, opened)})
        == 3
    )
    assert other.bind(MODEL, {}, ["teacher.*"]).identity == other.identity


def test_the_message_about_an_ambiguous_choice_names_the_places_and_the_cure() -> None:
    assert read(under("student.", "teacher."))[1].unclear == (
        "the whole model occurs under `student.` and `teacher.`. List the names to leave out in the recipe, as in "
        'ignore: ["teacher.*"], or append the one to use to the paths, as in ?key=teacher'
    )
    assert read([*under("net."), "a.bias"])[1].unclear == (
        "it contains both net.a.bias and a.bias, which the model has once. List the one to leave out in the recipe, as in "
        'ignore: ["a.bias"]'
    )


def test_the_remark_says_which_copy_is_used_and_what_was_left_out() -> None:
    names = [*under("net._orig_mod."), *under("ema_model.module."), "n_averaged", *AT_TOP[:1], *METRICS]
    assert read({"": infos_of(names)})[1].remarks == (
        "6 tensors (n_averaged, criterion.*, train_acc.*, val_metrics.*, ...) outside `net._orig_mod.` were left out: the "
        "model has none.",
        "it contains the whole model under `net._orig_mod.` and under `ema_model.module.`. The first was used; append "
        "?key=ema_model.module to the path to use the other.",
    )


def test_of_two_copies_the_one_of_the_right_shape_is_used() -> None:
    given = infos([*under("student."), *under("teacher.")])
    for prefix in ("student.", "teacher."):
        shapes = {name: given[prefix + name].shape for name in BARE}
        other = "teacher" if prefix == "student." else "student"
        reading = best_reading({"": given}, shapes, {}, [f"{other}.*"])
        assert {name: info.shape for name, info in reading.tensors.items()} == shapes
        assert not reading.unclear
        reading = best_reading({"": given}, shapes, {})  # the other model is not left out in silence
        assert len(reading.tensors) > len(shapes) or reading.unclear


def test_wrappers_are_dropped_wherever_they_stand() -> None:
    names = ["a._orig_mod.weight", "a._orig_mod.bias", "b._checkpoint_wrapped_module.weight", "b.module._orig_mod.bias"]
    for prefix in ("", "net.", "model.module.net."):
        found, reading = read([prefix + name for name in names])
        assert fits(found, reading)
        assert found == dict(zip(BARE, (prefix + name for name in names), strict=True))
        assert reading.remarks == ()


def test_a_name_that_the_model_has_is_not_taken_for_a_wrapped_one() -> None:
    """A model may have a module called `module`, beside one that is called the same without it."""
    for own in (["a.module.w", "a.w"], ["module.w", "w"], ["a.module.w", "a.v"]):
        for prefix in ("", "net.", "_orig_mod."):
            given = infos([prefix + name for name in own])
            reading = best_reading({"": given}, set(own), {})
            assert not reading.unclear
            assert reading.tensors == {name: given[prefix + name] for name in own}
    half = best_reading({"": infos(["a.module.w"])}, {"a.module.w", "a.w"}, {})
    assert set(half.tensors) == {"a.module.w"}


def test_of_two_tensors_with_one_name_that_which_is_not_ignored_is_used() -> None:
    names = [*under("module."), "b.weight"]
    for other, kept in (("b.weight", "module.b.weight"), ("module.b.weight", "b.weight")):
        found, reading = read(names, [other])
        assert fits(found, reading)
        assert found["b.weight"] == kept
        assert (reading.chosen == "") == (kept == "module.b.weight")  # keys of a cache differ


def test_prefixes_that_only_some_names_have_are_removed_if_every_name_stays_distinct() -> None:
    names = ("module.a.weight", "a.bias", "module.model.b.weight", "_orig_mod.b.bias")
    found, reading = read(names)
    assert fits(found, reading)
    assert found == dict(zip(BARE, names, strict=True))


def test_of_two_containers_with_the_whole_model_the_first_is_used_and_both_are_named() -> None:
    containers = {"state_dict": under("module."), "state_dict_ema": under("")}
    found, reading = read(containers)
    assert found == {name: f"state_dict:module.{name}" for name in MODEL}
    assert reading.remarks == (
        "it contains the whole model under `state_dict` and `state_dict_ema`. The first was used; append "
        "?key=state_dict_ema to the path to use another.",
    )
    assert read({"state_dict": BARE, "optimizer": ["x"]})[1].remarks == ()
    (remark,) = read({"state_dict": BARE, "current_model_state": BARE})[1].remarks
    assert remark.startswith(
        "its `state_dict` is the average of the weights over the training (Lightning's WeightAveraging)"
    )
    assert remark.endswith("append ?key=current_model_state to the path to use the last weights.")
    found, reading = read({"state_dict": [*BARE, "c"], "state_dict_ema": BARE})  # not the second one in silence
    assert set(found) == {*MODEL, "c"}


def test_tied_and_renamed_tensors_count_once_and_both_copies_are_compared() -> None:
    tied = {"head.weight": "b.weight", "a.gamma": "a.weight"}
    names = ("model.a.gamma", "model.a.bias", "model.b.weight", "model.b.bias")
    found, reading = read([*names, "model.head.weight"], (), tied)
    assert fits(found, reading)
    assert found == dict(zip(BARE, names, strict=True))
    assert [(first, alias) for first, alias, _ in reading.copies] == [("b.weight", "head.weight")]
    assert set(reading.aliases) == {"a.gamma", "head.weight"}
    found, reading = read(["net.a.gamma", "net.a.bias", "net.head.weight", "net.b.bias"], (), tied)
    assert fits(found, reading)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_counters_that_files_of_old_versions_lack_are_zero_as_torch_loads_them(tmp_path: Path, prefix: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    model[1].num_batches_tracked += 5
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    counters = [name for name in state if name.endswith("num_batches_tracked")]

    def bound(names: Iterable[str]) -> Ingredient:
        torch.save({prefix + name: state[name] for name in names}, tmp_path / "a.pt")
        return check_fits(open_ingredient(str(tmp_path / "a.pt")), shapes, {})

    found = bound(name for name in state if name not in counters)
    for name, tensor in state.items():
        assert torch.equal(found.read(name).view(tensor.shape), tensor if name not in counters else torch.tensor(0))
    assert found.read(counters[0]).dtype == torch.int64
    assert found.remarks == (
        "it has no num_batches_tracked, like files from before PyTorch 0.4.1: they are 0, as torch loads it.",
    )
    with pytest.raises(IngredientError, match=rf"missing: {counters[1]}"):
        bound(name for name in state if name != counters[1])
    with pytest.raises(IngredientError, match=r"missing: 0\.bias"):
        bound(name for name in state if name not in [*counters, "0.bias"])


@pytest.mark.parametrize("at", ["state_dict", "", "teacher."])
def test_tensors_without_counters_are_no_second_model_beside_one_with_them(tmp_path: Path, at: str) -> None:
    """Some scripts keep an average of the floating-point tensors alone."""
    model = torch.nn.BatchNorm1d(3)
    state = dict(model.state_dict())
    average = {name: tensor + 1 for name, tensor in state.items() if tensor.is_floating_point()}
    file = {"model": state, **({at: average} if at == "state_dict" else average)}
    if at.endswith("."):
        file = {**average, **{at + name: tensor for name, tensor in state.items()}}
    torch.save(file, tmp_path / "a.pt")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = open_ingredient(str(tmp_path / "a.pt")).bind(shapes, {})
    if at.endswith("."):
        assert "it contains both teacher." in found.unclear
    else:
        assert torch.equal(found.read("weight"), state["weight"])
        assert not found.unclear


STARTS = st.lists(st.sampled_from([*PREFIXES, *(f"{w}." for w in WRAPPERS), "net.", "ema_model."]), max_size=2).map("".join)
MODELS = st.lists(st.tuples(STARTS, st.sets(st.sampled_from(BARE), min_size=1) | st.just(set(BARE))), max_size=3)
OTHERS = ["c.weight", "n_averaged", "criterion.weight", "acc.confmat", "a.", ""]
EXTRAS = st.lists(st.tuples(STARTS, st.sampled_from(OTHERS)), max_size=2)
NAMES = st.builds(
    lambda models, extras: sorted({s + n for s, some in models for n in some} | {s + n for s, n in extras}), MODELS, EXTRAS
)


@settings(max_examples=200, deadline=None)
@given(NAMES, st.lists(st.sampled_from(["c*", "net.*", "*ema_model.*", "*", "n_averaged"]), max_size=2))
def test_every_reading_that_fits_is_one_to_one_and_explains_every_other_tensor(names: list[str], ignore: list[str]) -> None:
    found, reading = read(names, ignore)
    event("fits" if fits(found, reading) else "does not fit")
    if not fits(found, reading):
        return
    assert len(set(found.values())) == len(MODEL)
    assert all(unwrapped(in_file).endswith(name) for name, in_file in found.items())
    others = set(names) - set(found.values())
    assert len(reading.left_out) == len(others)
    assert all(any(name.endswith(left) for left in reading.left_out) for name in others)
    assert bool(reading.remarks) == bool(others)


@pytest.mark.parametrize("depth", [3, 1000])
def test_deep_names_take_no_time(depth: int) -> None:
    names = [prefix * depth + name for prefix in ("model.", "module.") for name in BARE]
    found, reading = read([*names, *(f"p{n}.b.weight" for n in range(3000))])
    assert not fits(found, reading)
