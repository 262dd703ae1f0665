"""The output folder of a run: started, resumed, found complete, published."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import lease, storage
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lease import state_folder
from ray_soup.recipe import Recipe, for_method, make_recipe, with_changes
from ray_soup.soups import records
from ray_soup.soups.identity import begun
from ray_soup.soups.output import KEPT_STATE, Output, Soup, open_output
from ray_soup.soups.state import LearnState, save_state, task_of
from tests.conftest import values

ROWS = [{"model_name": "mehl+", "test_nll": 0.25, "steps": 3}]


@pytest.fixture
def recipe(zoo: Path, tmp_path: Path) -> Recipe:
    """A recipe for two ingredients that a test may change."""
    (tmp_path / "zoo").mkdir()
    for k in range(2):
        shutil.copy(zoo / "zoo" / f"model_{k}.safetensors", tmp_path / "zoo")
    return make_recipe(values(zoo, ingredients=str(tmp_path / "zoo")))


def ingredients_of(recipe: Recipe) -> list[Ingredient]:
    return open_ingredients(recipe.ingredients)


def begin(out: Path, recipe: Recipe, **options: Any) -> Soup | None:
    with open_output(out) as output:
        return output.begin(begun(recipe, ingredients_of(recipe), **options))


def publish(output: Output, recipe: Recipe, **more: Any) -> dict[str, Any]:
    """Publish a model of five bytes; returns run.json."""
    staging = output.staging()
    (staging / "model.safetensors").write_bytes(b"model")
    record: Any = {"method": "mehl+", "exit": 0, "ingredients": [], "notes": ["a note"], **more}
    output.publish(recipe, ROWS, record, staging)
    return record


def test_only_a_resumed_run_has_the_token_of_an_earlier_one(tmp_path: Path, recipe: Recipe) -> None:
    found = []
    for folder in ("a", "a", "b"):
        begin(tmp_path / folder, recipe)
        with open_output(tmp_path / folder) as output:
            found.append(output.token())
    assert found[0] == found[1] != found[2]


def finish(out: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    with open_output(out) as output:
        assert output.begin(begun(recipe, ingredients_of(recipe), **options)) is None
        more = {key: options[key] for key in ("compare",) if key in options}
        return publish(output, recipe, **more)


def work_in(out: Path, recipe: Recipe, **options: Any) -> None:
    """Begin a run that leaves the state of a soup."""
    begin(out, recipe, **options)
    (out / "state" / "learn.pt").write_bytes(b"a state")


def token_of(out: Path) -> str:
    with open_output(out) as output:
        return output.token()


def names(folder: Path) -> list[str]:
    """The files in a folder, without the lock file: some versions of filelock remove it, others do not."""
    return sorted(file.name for file in folder.iterdir() if file.name != "lock")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: the content of each file, None for a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


# Starting, resuming and finding a finished run


def test_a_run_is_begun_then_resumed_then_found_complete(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    assert begin(out, recipe) is None
    assert names(out / "state") == ["begun.json"]
    assert begin(out, recipe) is None
    record = finish(out, recipe)
    soup = begin(out, recipe)
    assert soup is not None
    assert (soup.out, soup.rows, soup.record, soup.notes) == (out, ROWS, record, ["a note"])
    assert soup.was_complete


def test_a_failed_run_is_resumed(tmp_path: Path, recipe: Recipe) -> None:
    begin(tmp_path / "out", recipe)
    (tmp_path / "out" / "run.json").write_text('{"exit": 130, "error": "KeyboardInterrupt"}')
    assert begin(tmp_path / "out", recipe) is None


def test_a_damaged_run_json_is_refused_and_made_again_once_it_is_removed(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    finish(out, recipe)
    (out / "run.json").write_text('{"exit": 0, ')
    before = tree(out)
    with pytest.raises(RecipeError, match=r"run\.json is damaged .*remove it and rerun the command"):
        begin(out, recipe)
    assert tree(out) == before
    (out / "run.json").unlink()
    assert begin(out, recipe) is None


def test_a_finished_run_that_lost_a_file_is_not_complete(tmp_path: Path, recipe: Recipe) -> None:
    finish(tmp_path / "out", recipe)
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(SoupError, match=r"model\.safetensors was changed: its SHA-256 is missing, but run\.json has"):
        begin(tmp_path / "out", recipe)


def test_another_recipe_is_refused_and_its_keys_are_named(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    work_in(out, recipe)
    other = with_changes(recipe, {"learn.lr": 0.5, "learn.epochs": 9})
    message = (
        rf"{out} belongs to another recipe: (learn\.epochs was 2 and is now 9; learn\.lr was \S+ and is now 0\.5|"
        r"learn\.lr was \S+ and is now 0\.5; learn\.epochs was 2 and is now 9)\. Choose a new folder"
    )
    with pytest.raises(RecipeError, match=message):
        begin(out, other)
    assert begin(out, with_changes(recipe, {"actors.replicas": 2, "actors.cpus": 0.5})) is None  # actors may change


def test_changed_ingredients_are_refused_and_named(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    work_in(out, recipe)
    os.utime(tmp_path / "zoo" / "model_1.safetensors", ns=(1, 1))
    with pytest.raises(RecipeError, match=r"ingredients that have changed since: \S+/zoo/model_1\.safetensors\. Choose"):
        begin(out, recipe)


def test_another_command_is_refused_and_named(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    work_in(out, recipe, compare=[1, [], []])
    message = r"was begun by `ray-soup compare`, and this command is `{}`\. Choose a new folder, or add --overwrite"
    with pytest.raises(RecipeError, match=message.format("learn")):
        begin(out, recipe)
    with pytest.raises(RecipeError, match=message.format("search")):
        begin(out, recipe, kind="search")
    assert begin(out, recipe, compare=[1, [], []]) is None


def test_a_comparison_takes_more_seeds_and_subsets_and_a_finished_one_no_fewer(tmp_path: Path, recipe: Recipe) -> None:
    out, finished = tmp_path / "out", [2, [0, 2], []]
    work_in(out, recipe, compare=[3, [], []])
    token = token_of(out)
    assert begin(out, recipe, compare=finished) is None  # nothing is lost
    assert records.read_begun(out / "state" / "begun.json")["compare"] == finished
    finish(out, recipe, compare=finished)
    smaller = (
        ([1, [0, 2], []], "--seeds 1 --drop-top 0,2"),
        ([3, [0], [4]], "--seeds 3 --drop-top 0 --by-count 4"),
        ([2, [0, 2], [], "no-trained"], "--seeds 2 --drop-top 0,2 --no-trained"),
    )
    for options, typed in smaller:
        with pytest.raises(RecipeError, match=rf"comparison with --seeds 2 --drop-top 0,2; this command has {typed}, and"):
            begin(out, recipe, compare=options)
    larger = [3, [0, 2, 1], [2]]
    for _ in range(2):
        with open_output(out) as output:
            assert output.begin(begun(recipe, ingredients_of(recipe), compare=larger)) is None
            output.state("soups").mkdir(exist_ok=True)
            output.state("soups", "a.json").write_text("{}")
            fail_with(output, KeyboardInterrupt(), lambda: None)
    soup = begin(out, recipe, compare=finished)  # which stays finished until the larger one is
    assert soup is not None and soup.record["compare"] == finished  # noqa: PT018
    assert token_of(out) == token
    finish(out, recipe, compare=larger)
    assert begin(out, recipe, compare=larger) is not None
    with pytest.raises(RecipeError, match="would replace it by a smaller one"):
        begin(out, recipe, compare=finished)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in "edcba":
        (out / name).write_text(name)
    with pytest.raises(RecipeError, match=r"is not empty and was not written by ray_soup \(found a, b, c, d\)\. Choose"):
        begin(out, recipe)
    assert names(out) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "its content: Input should be"),
        ("{}", "no 'recipe'"),
        ('{"recipe": "model: a"}', "no 'ingredients'"),
        ('{"recipe": 3, "ingredients": []}', "recipe: Input should be a valid string"),
        ('{"recipe": "model: a", "ingredients": {}}', "ingredients: Input should be a valid list"),
        ('{"recipe": "- a", "ingredients": []}', "recipe: found ['a']; expected keys"),
        ('{"recipe": "a: [", "ingredients": []}', "while parsing"),
    ],
)
def test_a_damaged_begun_json_is_refused(tmp_path: Path, recipe: Recipe, content: str, said: str) -> None:
    file = tmp_path / "out" / "state" / "begun.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(RecipeError) as error:
        begin(tmp_path / "out", recipe)
    assert str(error.value).startswith(f"{file} is damaged ({said}")
    assert str(error.value).endswith("). Choose a new folder, or empty this one.")
    assert file.read_text() == content


# Holding the folder


def test_a_folder_that_another_run_uses_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = rf"Another run is using {out}: process {os.getpid()} on .*\. Wait for it, or choose another folder\."
    with open_output(out), pytest.raises(RecipeError, match=message), open_output(out):
        pass
    with open_output(out):
        pass


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_begins_nothing_leaves_no_trace(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with open_output(out) as output:
        assert output.folder == out
        assert output.state("lease").exists()
        assert output.state().parent == out / "state" / "run-1"
    assert out.exists() == existed
    assert not existed or names(out) == []


def test_a_missing_out_and_one_among_the_ingredients_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="OUT is empty; expected a folder"), open_output(""):
        pass
    out = tmp_path / "zoo" / "out"
    with (
        pytest.raises(RecipeError, match="is where the recipe looks for ingredients"),
        open_output(out, ingredients=recipe.ingredients),
    ):
        pass
    (tmp_path / "file").write_text("a file")
    with (
        pytest.raises(RecipeError, match=r"file/out cannot be created: Not a directory"),
        open_output(tmp_path / "file/out"),
    ):
        pass
    assert not out.exists()


# Publishing


def test_publishing_moves_all_files_into_place_and_run_json_last(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "out", list[str]()
    replace = Path.replace

    def recording(self: Path, target: Path) -> Path:
        if Path(target).parent == out:
            moved.append(self.name)
        return replace(self, target)

    with open_output(out) as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        output.state("soups").mkdir()
        for name in ("resolved.json", "learn.pt", "soups/a.npz"):
            output.state(name).write_text("{}")
        monkeypatch.setattr(Path, "replace", recording)
        record = publish(output, recipe)
    assert sorted(moved) == ["model.safetensors", "recipe.yaml", "results.jsonl", "run.json"]
    assert moved[-1] == "run.json"
    assert names(out) == sorted([*moved, "state"])
    assert {*names(out / "state")} == {*KEPT_STATE} - {"lease", "lock"}
    files = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in moved if n != "run.json"}
    assert record["files"] == files == json.loads((out / "run.json").read_text())["files"]


@pytest.mark.parametrize("moves", range(4))
def test_an_interrupted_publication_has_no_run_json_and_can_be_repeated(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """The process ends after each number of moves."""
    out, moved = tmp_path / "out", list[str]()
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target).parent == out:
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(self.name)
        return replace(self, target)

    with monkeypatch.context() as patch, open_output(out) as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        output.state("learn.pt").write_text("state")
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(output, recipe)
    assert len(moved) == moves
    assert not (out / "run.json").exists()
    assert (out / "state" / "learn.pt").read_text() == "state"
    finish(out, recipe)
    assert begin(out, recipe) is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    with open_output(tmp_path / "out") as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        monkeypatch.setattr("ray_soup.soups.output.write_results", full)
        with pytest.raises(SoupError, match=rf"{tmp_path}/out could not be written \(No space left on device\)\. Free"):
            publish(output, recipe)


def take_over(out: Path) -> None:
    """Do what a run on another host does that takes over."""
    before, successor = Path(state_folder(str(out))), out / "state" / "run-2" / "theirs"
    successor.mkdir(parents=True)
    (successor / "lease").write_text('{"host": "another-host", "pid": 1, "run": "theirs", "beat": 7}')
    before.rename(successor / f"before-1-{before.name}")
    before.parent.rmdir()


def test_a_run_whose_folder_was_taken_over_publishes_nothing(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"

    def finish_late() -> None:
        with open_output(out) as output:
            output.begin(begun(recipe, ingredients_of(recipe)))
            take_over(out)
            publish(output, recipe)

    with pytest.raises(SoupError, match=r"process 1 on another-host took over"):
        finish_late()
    assert not (out / "run.json").exists()
    assert not (out / "model.safetensors").exists()


def test_a_run_that_was_taken_over_leaves_a_later_run_with_its_number_alone(tmp_path: Path) -> None:
    """P is suspended, Q takes over and ends, R begins; then P wakes, and fails."""
    out = tmp_path / "out"

    def files() -> dict[str, bytes | None]:
        return {name: data for name, data in tree(out).items() if not name.endswith("/lease")}

    with ExitStack() as stack:
        first = stack.enter_context(open_output(out))
        first.lease._stop.set()
        lease._ACTIVE.clear()
        with open_output(out) as second:
            assert second.state().parent.name == "run-2"
        third = stack.enter_context(open_output(out))
        assert third.state().parent == first.state().parent
        (third.staging() / "model.safetensors").touch()
        before = files()
        with pytest.raises(SoupError, match="could not be written"):
            save_state(LearnState(torch.zeros(2, 1)), first.state("learn.pt"))
        fail_with(first, KeyboardInterrupt(), lambda: None)
        assert files() == before


def test_staging_starts_empty(tmp_path: Path) -> None:
    with open_output(tmp_path / "out") as output:
        (output.staging() / "left").write_text("by an earlier start")
        assert names(output.staging()) == []


def fail_with(output: Output, error: BaseException, work: Callable[[], Any]) -> None:
    """Run `work` while failures are recorded, then fail."""

    def run() -> None:
        with output.recording_failures():
            work()
            raise error

    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SoupError("a loss"), 1, "a loss"),
        (RecipeError("a recipe"), 2, "a recipe"),
        (IngredientError("an ingredient"), 3, "an ingredient"),
        (KeyboardInterrupt(), 130, "interrupted. Rerun the same command to resume."),
        (ZeroDivisionError("division"), 1, "ZeroDivisionError: division"),
    ],
)
def test_a_failure_is_recorded_with_its_exit_code(tmp_path: Path, error: BaseException, code: int, text: str) -> None:
    with open_output(tmp_path / "out") as output:
        (output.staging() / "model.safetensors").write_bytes(b"half a model")
        fail_with(output, error, lambda: output.state("learn.pt").write_text("learned"))
        assert not output.state("out").exists()
    record = records.read_run_record(tmp_path / "out")
    assert record is not None
    assert text in record["error"]
    assert {k: v for k, v in record.items() if k != "error"} == {
        "exit": code,
        "version": records.RUN_VERSION,
        "results_version": records.RESULTS_VERSION,
    }
    with pytest.raises(RecipeError, match=rf"is not a finished soup: its run ended with exit code {code}\. Rerun"):
        records.finished_record(tmp_path / "out")


@pytest.mark.parametrize("error", [RecipeError("a recipe"), IngredientError("an ingredient")])
def test_a_run_that_is_refused_before_it_learned_leaves_the_folder_as_it_was(
    tmp_path: Path, recipe: Recipe, error: Exception
) -> None:
    def refused() -> None:
        with open_output(out) as output:
            assert output.begin(begun(recipe, ingredients_of(recipe))) is None
            output.state("soups").mkdir(exist_ok=True)
            (output.staging() / "model.safetensors").write_bytes(b"half a model")
            fail_with(output, error, lambda: output.state("resolved.json").write_text("resolved"))

    out = tmp_path / "a" / "out"
    refused()
    assert not (tmp_path / "a").exists()
    with open_output(out) as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        output.state("learn.pt").write_text("of an earlier start")
    (out / "run.json").write_text('{"exit": 130, "error": "interrupted"}')
    before = tree(out)
    refused()
    assert tree(out) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), RecipeError("late")])
def test_what_fails_after_the_publication_leaves_the_soup_finished(
    tmp_path: Path, recipe: Recipe, error: BaseException
) -> None:
    with open_output(tmp_path / "out") as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        fail_with(output, error, lambda: publish(output, recipe))
    assert records.finished_record(tmp_path / "out")["method"] == "mehl+"


def test_state_that_cannot_be_removed_does_not_fail_a_finished_run(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with open_output(tmp_path / "out") as output:
        output.begin(begun(recipe, ingredients_of(recipe)))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rmdir", fail)
            publish(output, recipe)
    assert begin(tmp_path / "out", recipe) is not None


# Left by a mistake, and replaced


def learned(steps: int) -> bytes:
    """The state of a soup after this many steps."""
    state = LearnState(torch.zeros(2, 1, dtype=torch.float64), steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        save_state(state, Path(folder, "learn.pt"))
        return Path(folder, "learn.pt").read_bytes()


def test_a_folder_whose_run_never_got_to_work_is_begun_afresh(tmp_path: Path, recipe: Recipe) -> None:
    out, mended = tmp_path / "out", with_changes(recipe, {"learn.lr": 0.5})
    begin(out, recipe, compare=[1, [], []])
    for name in ("learn.pt", "soups/mehl.pt", "soups/cosines.npy", "tune/trial/params.json", "out/model.safetensors"):
        (out / "state" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "state" / name).write_bytes(learned(0) if name.endswith(".pt") else b"nothing")
    (out / "state" / "resolved.json").write_text("{}")
    records.write_run_record({"exit": 1, "error": "no Ray"}, out / "run.json")
    (out / "mine.txt").write_text("mine")
    assert begin(out, mended) is None
    assert names(out) == ["mine.txt", "state"]
    assert names(out / "state") == ["begun.json"]
    for name in ("learn.pt", "soups/mehl.pt"):
        (out / "state" / name).parent.mkdir(exist_ok=True)
        (out / "state" / name).write_bytes(learned(1))
        with pytest.raises(RecipeError, match=r"another recipe: learn\.lr was 0\.5 .* or add --overwrite to replace"):
            begin(out, recipe)
        (out / "state" / name).unlink()
    assert begin(out, recipe) is None


@pytest.mark.parametrize(
    ("method", "more", "unused", "used"),
    [
        ("uniform", {}, {"learn.lr": 0.5, "blocks": "layer", "greedy.keep": ">", "finetune.trials": 2}, {"learn.seed": 7}),
        ("uniform", {"data": {}}, {"learn.seed": 7, "precision": "bfloat16"}, {"out_dtype": "float16"}),
        ("uniform", {"polish": {"epochs": 1}}, {"schedule.window": 2}, {"precision": "bfloat16"}),
        ("greedy", {}, {"learn.epochs": 9, "directions.dtype": "float32"}, {"greedy.keep": ">"}),
        ("ema", {}, {"learn.epochs": 9}, {"schedule.window": 2}),
        ("mehl+", {}, {"search.trials": 3, "actors.cpus": 2}, {"blocks": "layer"}),
        ("mehl+", {}, {"finetune.trials": 2}, {"data.train": "more.npz"}),  # its class folders number those of all data
    ],
)
def test_only_keys_that_the_method_uses_make_another_recipe(
    tmp_path: Path, recipe: Recipe, method: str, more: dict[str, Any], unused: dict[str, Any], used: dict[str, Any]
) -> None:
    out, values = tmp_path / "out", {**for_method(recipe, method).model_dump(), **more}
    recipe = make_recipe(values)
    finish(out, recipe)
    assert begin(out, with_changes(recipe, unused)) is not None
    with pytest.raises(RecipeError, match=rf"belongs to another recipe: {next(iter(used))} was"):
        begin(out, with_changes(recipe, used))


def test_the_state_of_learning_does_not_depend_on_training_data(recipe: Recipe) -> None:
    assert task_of(recipe) == task_of(with_changes(recipe, {"data.train": "more.npz"}))


def overwrite(out: Path, recipe: Recipe, work: Callable[[Output], Any]) -> None:
    with open_output(out, overwrite=True) as output:
        assert output.begin(begun(recipe, ingredients_of(recipe))) is None
        work(output)


def test_overwriting_replaces_what_runs_wrote_once_the_new_run_is_finished(tmp_path: Path, recipe: Recipe) -> None:
    out, other = tmp_path / "out", with_changes(recipe, {"learn.lr": 0.5})
    finish(out, recipe)
    (out / "tensorboard" / "mehl+").mkdir(parents=True)
    (out / "tensorboard" / "mehl+" / "events.out.tfevents.1.host").touch()
    before = tree(out)

    def fails(output: Output, error: BaseException, *made: str) -> None:
        assert names(out) == ["state"]
        assert names(output.state()) == ["begun.json", "lease", "replaced"]
        fail_with(output, error, lambda: [output.state(name).write_bytes(learned(1)) for name in made])

    for error in (RecipeError("a label"), SoupError("no Ray"), KeyboardInterrupt()):
        overwrite(out, other, lambda output: fails(output, error))  # noqa: B023
        assert tree(out) == before  # none of them got to work
    overwrite(out, other, lambda output: fails(output, SoupError("a loss"), "learn.pt"))
    assert names(out) == ["run.json", "state"]
    overwrite(out, recipe, lambda output: None)  # the one that failed is deleted, not kept
    assert names(out / "state") == ["begun.json", "replaced"]
    overwrite(out, other, lambda output: publish(output, other))
    assert names(out) == ["model.safetensors", "recipe.yaml", "results.jsonl", "run.json", "state"]
    assert names(out / "state") == ["begun.json"]
    assert begin(out, other) is not None


@pytest.mark.parametrize("remote", [False, True])
def test_what_actors_keep_is_work_and_is_replaced(
    tmp_path: Path, recipe: Recipe, remote: bool, request: pytest.FixtureRequest
) -> None:
    """A run that ends with an error can be resumed from it, and one that overwrites it begins without it."""
    out = f"{request.getfixturevalue('s3')}/out" if remote else str(tmp_path / "out")

    def refuse() -> None:
        with open_output(out) as output:
            output.begin(begun(recipe, ingredients_of(recipe)))
            with output.recording_failures():
                storage.write_bytes(b"state", f"{output.kept_by_actors('polish')}_0.pt")
                raise RecipeError("a metric")

    def look() -> None:
        with open_output(out) as output:
            assert output.begin(begun(recipe, ingredients_of(recipe))) is None
            assert storage.read_bytes(f"{output.kept_by_actors('polish')}_0.pt") == b"state"
            raise KeyboardInterrupt

    with pytest.raises(RecipeError, match="a metric"):
        refuse()
    assert json.loads(storage.read_bytes(f"{out}/run.json"))["error"] == "a metric"
    with pytest.raises(KeyboardInterrupt):
        look()
    with open_output(out, overwrite=True) as output:
        assert output.begin(begun(recipe, ingredients_of(recipe))) is None
        assert not storage.exists(f"{output.kept_by_actors('polish')}_0.pt")
        storage.write_bytes(b"new", f"{output.kept_by_actors('polish')}_0.pt")
        publish(output, recipe)
    assert not [name for name in storage.walk(out) if "actors" in name or "replaced" in name]


def test_overwriting_refuses_other_and_changed_files_by_name(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    finish(out, recipe)
    (out / "mine").mkdir()
    for name in ("mine/notes.txt", "state/mine", "model_1.safetensors"):
        (out / name).write_text("mine")
    (out / "results.jsonl").write_text("edited")
    before = tree(out)
    message = "mine/notes.txt, model_1.safetensors, results.jsonl, state/mine. Move them elsewhere, or choose a new folder."
    with pytest.raises(RecipeError) as error:
        overwrite(out, recipe, lambda output: None)
    assert str(error.value) == (
        f"--overwrite deletes only what ray_soup wrote, but {out} has other files, or files that were changed since: "
        f"{message}"
    )
    assert tree(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(RecipeError, match="was not written by ray_soup"):
        overwrite(foreign, recipe, lambda output: None)
    assert names(foreign) == ["thesis.tex"]


def test_overwriting_loses_nothing_wherever_it_is_interrupted(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old run waits until a new one has finished, through crashes between any two moves, refusals and plain reruns."""
    out, other, moves = tmp_path / "out", with_changes(recipe, {"learn.lr": 0.5}), 0
    finish(out, recipe)
    before, move = tree(out), Path.replace
    waiting = out / "state" / "replaced"

    for crash in range(6):

        def moved(file: Path, target: Path) -> Path:
            nonlocal moves
            if waiting in Path(target).parents:
                moves += 1
                if moves > crash:  # noqa: B023
                    raise MemoryError
            return move(file, target)

        moves = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", moved)
            patch.setattr("ray_soup.soups.output.put_back", lambda *_: None)  # the process is gone
            patch.setattr("ray_soup.soups.output.restore", lambda state, before: True)
            with suppress(MemoryError):
                overwrite(out, other, lambda output: None)
        found = {name.removeprefix("state/replaced/"): content for name, content in tree(out).items()}
        assert found.items() >= before.items(), crash
    overwrite(out, other, lambda output: fail_with(output, RecipeError("a label"), lambda: None))
    assert tree(out) == before
    overwrite(out, other, lambda output: None)  # killed before it got to work
    begin(out, with_changes(recipe, {"learn.lr": 0.25}))  # without --overwrite
    assert (waiting / "model.safetensors").exists()


def test_files_of_the_users_in_folders_are_not_overwritten(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    finish(out, recipe)
    (out / "mine").mkdir()
    (out / "mine" / "events.out.tfevents.1").touch()
    with pytest.raises(RecipeError, match=r"has other files, .*: mine/events\.out\.tfevents\.1\."):
        overwrite(out, recipe, lambda output: None)


def test_a_refused_overwrite_changes_nothing_and_a_new_soup_is_the_one_that_is_put_back(
    tmp_path: Path, recipe: Recipe
) -> None:
    out, other = tmp_path / "out", with_changes(recipe, {"learn.lr": 0.5})
    assert begin(out, recipe) is None
    (out / "notes.txt").touch()
    before = tree(out)
    with pytest.raises(RecipeError, match=r"notes\.txt"):
        overwrite(out, recipe, lambda output: None)
    assert tree(out) == before
    (out / "notes.txt").unlink()
    finish(out, recipe)
    overwrite(out, other, lambda output: publish(output, other))
    (out / "state" / "replaced" / "state").mkdir(parents=True)  # as if the run had been killed while it cleaned up
    (out / "state" / "replaced" / "state" / "begun.json").write_text("{}")
    newest = (out / "run.json").read_bytes()
    overwrite(out, recipe, lambda output: fail_with(output, RecipeError("a label"), lambda: None))
    assert (out / "run.json").read_bytes() == newest
    assert begin(out, other) is not None


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"rows": {"a": [1]}}, {"rows": {"a": [2]}}, "files under compare.rows that have changed"),
        ({"source": "a"}, {"source": "b"}, "was begun by `ray-soup bake a`"),
        ({"source": "a"}, {}, "was begun by `ray-soup bake a`"),
        ({"adopted": {"mean": "0.5", "img_size": "48"}}, {"adopted": {"mean": "0.4"}},
         "was started with what files of the ingredients state, which has changed: mean was 0.5 and is now 0.4; img_size "
         "was 48 and is now not stated. Choose a new folder, restore the files, or add --overwrite"),
        ({}, {"adopted": {"mean": "0.4"}}, "which has changed: mean was not stated and is now 0.4."),
    ],
)  # fmt: skip
def test_other_rows_files_and_another_source_make_another_run(
    tmp_path: Path, recipe: Recipe, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {} if "source" in before else {"compare": [1, [], []]}
    with open_output(tmp_path / "out") as output:
        output.begin(begun(recipe, ingredients_of(recipe), **options, **before))
        publish(output, recipe)
    with pytest.raises(RecipeError, match=re.escape(said)):
        begin(tmp_path / "out", recipe, **options, **now)


def test_a_recipe_that_states_what_was_adopted_is_the_same(tmp_path: Path, recipe: Recipe) -> None:
    """`recipe.yaml` in OUT states it: this is the recipe that a user reruns. Another value is another recipe."""
    plain, stated, other, some, all_of_it = (
        with_changes(recipe, {"model": f"timm:resnet18{options}"})
        for options in ("", "?mean=0.5", "?mean=0.4", "?std=1", "?mean=0.5&std=1")
    )
    same = ((plain, {"mean": "0.5"}, stated), (stated, {}, plain), (some, {"mean": "0.5"}, all_of_it))
    for number, (first, adopted, second) in enumerate(same):
        out = tmp_path / str(number)
        with open_output(out) as output:
            output.begin(begun(first, ingredients_of(recipe), **({"adopted": adopted} if adopted else {})))
            publish(output, first)
        more = {"adopted": {"mean": "0.5"}} if second is plain else {}
        with open_output(out) as output:
            assert output.begin(begun(second, ingredients_of(recipe), **more)) is not None
        with pytest.raises(RecipeError, match=r"model was timm:resnet18.* and is now timm:resnet18.mean=0.4"):
            begin(out, other)
        with pytest.raises(RecipeError, match=r"belongs to another recipe: data.test was .* and is now .*other.npz"):
            begin(out, with_changes(second, {"data.test": "other.npz"}), **more)


def test_published_files_have_the_mode_that_the_umask_leaves(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"

    def closed(output: Output) -> None:
        staging = output.staging()
        (staging / "model.safetensors").touch(0o600)
        output.publish(recipe, ROWS, {"method": "mehl+", "exit": 0, "ingredients": []}, staging)

    before = os.umask(0o022)
    try:
        overwrite(out, recipe, closed)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in names(out) if name != "state"} == {0o644}


# Where OUT may be


def odd_places(tmp_path: Path) -> dict[str, tuple[str | Path, str]]:
    """Places where no run may write, and what is said about them."""
    (tmp_path / "file").write_text("a file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text("model: x")
    (tmp_path / "used" / "state").mkdir(parents=True)
    (tmp_path / "used" / "state" / "notes.txt").write_text("mine")
    job = tmp_path / "ray" / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    (tmp_path / "job").symlink_to(job)
    return {
        "nothing": ("", "OUT is empty"),
        "a file": (tmp_path / "file", "cannot be created: a file is in its place"),
        "below a file": (tmp_path / "file" / "out", "cannot be created: Not a directory"),
        "a FIFO": (tmp_path / "fifo", "cannot be created: something that is not a folder is in its place"),
        "a device": ("/dev/null", "cannot be created: something that is not a folder"),
        "a link to nothing": (tmp_path / "dangling", "a link to /nowhere/at/all, which does not exist, is in its place"),
        "the root": ("/", "is not empty and was not written by ray_soup"),
        "the folder of a recipe": (tmp_path / "own", r"was not written by ray_soup \(found recipe\.yaml\)"),
        "a folder with another state": (tmp_path / "used", r"was not written by ray_soup \(found state/notes\.txt\)"),
        "nobody's home": ("~nobody_at_all/out", "there is no user nobody_at_all"),
        "a name that is not UTF-8": (os.fsdecode(bytes(tmp_path) + b"/\xff"), "is not UTF-8"),
        "a name of two lines": (tmp_path / "a\nb", "contains control characters"),
        "a name with a NUL": ("a\0b", "contains control characters"),
        "a name that is too long": (tmp_path / ("a" * 300), "cannot be created: File name too long"),
        "/proc": ("/proc/out", "cannot be created"),
        "a job's folder": (job / "out", "is inside the working directory of a Ray job"),
        "a job's folder by way of a link": (tmp_path / "job" / "out", "is inside the working directory of a Ray job"),
    }


def test_a_place_where_no_run_may_write_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    places = odd_places(tmp_path)
    before = tree(tmp_path)
    for out, said in places.values():
        with pytest.raises(RecipeError, match=said), open_output(out):
            pass
    assert tree(tmp_path) == before


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_output("~/out") as output:
        assert output.folder == tmp_path / "out"


def test_a_link_to_an_output_folder_is_followed(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    finish(tmp_path / "out", recipe)
    assert begin(tmp_path / "disk", recipe) is not None


@pytest.mark.parametrize("name", ["state", "state/soups", "state/learn.pt", "state/lease", "state/a.tmp", "tensorboard"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, recipe: Recipe, name: str) -> None:
    out, stranger = tmp_path / "out", tmp_path / "stranger"
    begin(out, recipe)
    if name == "state":
        shutil.move(out / "state", stranger)
    else:
        stranger.write_text("theirs") if "." in name or name.endswith("lease") else stranger.mkdir()
    (out / name).symlink_to(stranger)
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match=rf"{out}/{name} is a link to {stranger}, outside of OUT"):
        begin(out, recipe)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "recipe.yaml", "results.jsonl"])
def test_a_linked_file_is_replaced_and_its_target_left_alone(tmp_path: Path, recipe: Recipe, name: str) -> None:
    out = tmp_path / "out"
    begin(out, recipe)
    (tmp_path / "stranger").write_text('{"exit": 1}')
    (out / name).symlink_to(tmp_path / "stranger")
    finish(out, recipe)
    assert (tmp_path / "stranger").read_text() == '{"exit": 1}'
    assert not (out / name).is_symlink()


def test_keys_that_are_newer_than_the_folder_have_their_defaults(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    work_in(out, recipe)
    file = out / "state" / "begun.json"
    record = json.loads(file.read_text())
    old = yaml.safe_load(record["recipe"])
    del old["greedy"], old["learn"]["clip"]
    file.write_text(json.dumps({**record, "recipe": yaml.safe_dump(old)}))
    assert begin(out, recipe) is None
    with pytest.raises(RecipeError, match=r"learn\.clip was None and is now 1\.0"):
        begin(out, with_changes(recipe, {"learn.clip": 1.0}))


# Remote storage


def test_a_uri_is_published_from_a_local_mirror(s3: str, tmp_path: Path, recipe: Recipe) -> None:
    uri = f"{s3}/out"

    def fail() -> None:
        with open_output(uri) as output:
            output.begin(begun(recipe, ingredients_of(recipe)))
            raise RecipeError(f"{output.folder}/file is wrong")

    with pytest.raises(RecipeError) as error:
        fail()
    assert str(error.value) == f"{uri}/file is wrong"
    assert storage.exists(f"{state_folder(uri)}/begun.json")
    with open_output(uri) as output:
        assert output.begin(begun(recipe, ingredients_of(recipe))) is None
        assert output.shared_files() == ()
        assert output.uri_of("a", "b") == f"{uri}/a/b"
        (output.folder / "part.safetensors").write_bytes(b"part")
        (output.folder / "index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
        before = output.visible_to_actors(output.folder / "index.json")
        (output.folder / "part.safetensors").write_bytes(b"next")
        seen = output.visible_to_actors(output.folder / "index.json")
        assert re.fullmatch(rf"{output.lease.folder}/evaluated/[0-9a-f]+/index\.json", seen)
        assert storage.read_bytes(seen.replace("index.json", "part.safetensors")) == b"next"
        assert seen != before
        assert sorted(storage.walk(f"{output.lease.folder}/evaluated").keys()) == [
            f"{seen.split('/')[-2]}/{name}" for name in ("index.json", "part.safetensors")
        ]
        (output.folder / "part.safetensors").unlink()
        (output.folder / "index.json").unlink()
        publish(output, recipe)
        soup = Soup(output.folder, ROWS, {}).at(uri)
    assert soup.out == uri
    assert sorted(storage.walk(uri)) == [
        "model.safetensors", "recipe.yaml", "results.jsonl", "run.json", "state/lease",
        f"{state_folder(uri).removeprefix(uri)[1:]}/begun.json",
    ]  # fmt: skip
    with open_output(uri) as output:
        assert output.begin(begun(recipe, ingredients_of(recipe))) is not None


def test_a_run_at_a_uri_has_its_token_again_when_it_is_resumed(s3: str, recipe: Recipe) -> None:
    found = set()
    for compare in ([2, [], []], [3, [], []], [3, [], []]):
        with open_output(f"{s3}/out") as output:
            assert output.begin(begun(recipe, ingredients_of(recipe), compare=compare)) is None
            found.add(output.token())
    assert len(found) == 1


@pytest.mark.parametrize("has_lease", [False, True])
def test_a_folder_of_an_earlier_version_is_resumed_and_keeps_its_token(
    tmp_path: Path, recipe: Recipe, has_lease: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is in OUT/state itself, begun.json has no token, and the lease of its run may have been left behind."""
    monkeypatch.setattr(lease, "LEASE_S", 1)
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    records.write_begun(begun(recipe, ingredients_of(recipe), compare=[2, [], []]), out / "state" / "begun.json")
    (out / "state" / "learn.pt").write_bytes(learned(1))
    if has_lease:
        (out / "state" / "lease").write_text('{"host": "another-host", "pid": 1, "run": "theirs", "beat": 7}')
        (out / "state" / "lock").touch()
    found = {token_of(out)}
    for seeds in (2, 3):
        with open_output(out) as output:
            assert output.begin(begun(recipe, ingredients_of(recipe), compare=[seeds, [], []])) is None
            assert output.state("learn.pt").read_bytes() == learned(1)
            found.add(output.token())
    assert len(found) == 1
    assert names(out / "state") == ["begun.json", "learn.pt"]


def test_overwriting_at_a_uri_says_so_at_once_and_replaces_the_earlier_run_at_the_end(s3: str, recipe: Recipe) -> None:
    uri, other = f"{s3}/out", with_changes(recipe, {"learn.lr": 0.5})
    for which, overwrites in ((recipe, False), (other, True)):
        with open_output(uri, overwrite=overwrites) as output:
            assert output.begin(begun(which, ingredients_of(which))) is None
            assert storage.exists(f"{uri}/run.json") == overwrites
            if overwrites:
                assert json.loads(storage.read_bytes(f"{uri}/run.json"))["exit"] == 1
                assert storage.exists(f"{uri}/model.safetensors")
            publish(output, which)
    assert sorted(name for name in storage.walk(uri) if not name.startswith("state/")) == [
        "model.safetensors", "recipe.yaml", "results.jsonl", "run.json",
    ]  # fmt: skip
    with open_output(uri) as output:
        assert output.begin(begun(other, ingredients_of(other))) is not None


def test_a_local_folder_is_where_actors_see_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_output(out) as output:
        assert output.uri_of("a", "b") == str(out / "a" / "b")
        assert output.visible_to_actors(out / "a") == str(out / "a")
        assert output.shared_files() == (str(output.state("resolved.json")),)
    assert Soup(out, [], {}).at("given/name").out == out
