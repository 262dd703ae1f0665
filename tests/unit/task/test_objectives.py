"""Each objective alone: losses, weights and what is correct equal torch's, and unsound outputs are named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ray_soup.actors.evaluation import outcome_of
from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.task.models import build, call_as, outputs_of
from ray_soup.task.objective import (
    IGNORED,
    OBJECTIVES,
    TARGETS,
    CausalLM,
    Classification,
    MultiLabel,
    Objective,
    Regression,
    Segmentation,
    TokenClassification,
    check_smoothing,
)
from ray_soup.task.own_functions import check_functions, loss_of, metric_of, objective_of

MADE = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=MADE)


def randint(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=MADE)


def cut(targets: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    """Mark a share of the units as not scored, and all of the third example."""
    found = targets.masked_fill(torch.rand(targets.shape, generator=MADE) < share, IGNORED)
    found[2] = IGNORED
    return found


TOKENS = randn(6, 9, 5), cut(randint(5, 6, 9))
PIXELS = randn(6, 5, 4, 3), cut(randint(5, 6, 4, 3))
NUMBERS = randn(6, 3), randn(6, 3)
LABELS = randn(6, 4), randint(2, 6, 4).float()


def test_every_objective_says_what_it_is() -> None:
    assert sorted(OBJECTIVES) == [
        "causal_lm", "classification", "masked_lm", "multi_label", "regression", "segmentation", "token_classification",
    ]  # fmt: skip
    for name, kind in OBJECTIVES.items():
        assert kind.name == name
        assert kind.targets in TARGETS


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_units_are_those_of_torch_with_its_ignored_index(smoothing: float) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)  # a mean over the units that are scored
    for objective, (outputs, targets), classes_second in (
        (CausalLM(), TOKENS, TOKENS[0].transpose(1, 2)),
        (Segmentation(), PIXELS, PIXELS[0]),
    ):
        losses, weights = objective.losses(outputs, targets, smoothing), objective.weights(targets)
        torch.testing.assert_close(losses.sum() / weights.sum(), criterion(classes_second, targets))
        for row in (0, 1, 3, 5):
            expected = criterion(classes_second[row : row + 1], targets[row : row + 1])
            torch.testing.assert_close(losses[row] / weights[row], expected)
        assert losses[2] == weights[2] == 0
        torch.testing.assert_close(objective.loss(outputs, targets, smoothing), losses.sum())


def test_accuracy_of_units_leaves_out_those_that_are_not_scored() -> None:
    for objective, (outputs, targets), at in ((TokenClassification(), TOKENS, 2), (Segmentation(), PIXELS, 1)):
        scored = targets != IGNORED
        expected = (outputs.argmax(at)[scored] == targets[scored]).sum()
        found = objective.correct(outputs, targets)
        assert found is not None
        assert found.sum() == expected
        assert found[2] == 0


def test_multi_label_losses_are_those_of_bce_with_logits() -> None:
    objective, (outputs, targets) = MultiLabel(), LABELS
    mean = objective.losses(outputs, targets).sum() / objective.weights(targets).sum()
    torch.testing.assert_close(mean, nn.BCEWithLogitsLoss()(outputs, targets))
    one = outputs[:, :1], targets[:, 0]  # a single label need not be in a list
    for found, expected in zip(
        (objective.losses(*one), objective.correct(*one), objective.weights(one[1])),
        (objective.losses(one[0], one[1][:, None]), (one[0][:, 0] > 0) == (one[1] > 0.5), torch.ones(6)),
        strict=True,
    ):
        assert found.tolist() == expected.tolist()
    assert torch.equal(objective.correct(outputs, targets), ((outputs.sigmoid() > 0.5) == targets.bool()).sum(1))
    unknown = targets.clone()
    unknown[:, 0] = -1
    rest = objective.losses(outputs[:, 1:], targets[:, 1:])
    torch.testing.assert_close(objective.losses(outputs, unknown), rest)
    assert torch.equal(objective.weights(unknown), torch.full((6,), 3))
    assert torch.equal(objective.correct(outputs, unknown), objective.correct(outputs[:, 1:], targets[:, 1:]))


def test_soft_labels_are_targets_too() -> None:
    soft = torch.rand(6, 4, generator=MADE)
    torch.testing.assert_close(
        MultiLabel().losses(LABELS[0], soft),
        F.binary_cross_entropy_with_logits(LABELS[0], soft, reduction="none").sum(1),
    )


def test_regression_losses_are_squared_errors() -> None:
    objective, (outputs, targets) = Regression(), NUMBERS
    mean = objective.losses(outputs, targets).sum() / objective.weights(targets).sum()
    torch.testing.assert_close(mean, nn.MSELoss()(outputs, targets))
    assert objective.correct(outputs, targets) is None
    torch.testing.assert_close(
        objective.losses(outputs[:, :1], targets[:, 0]), F.mse_loss(outputs[:, 0], targets[:, 0], reduction="none")
    )
    whole = targets.round().long()
    torch.testing.assert_close(objective.losses(outputs, whole), objective.losses(outputs, whole.float()))


def test_a_target_that_is_not_known_has_neither_loss_nor_gradient() -> None:
    outputs, targets = NUMBERS[0].clone().requires_grad_(), NUMBERS[1].clone()
    targets[1, 2] = targets[4] = torch.nan
    Regression().loss(outputs, targets).backward()
    assert torch.isfinite(outputs.grad).all()
    assert (outputs.grad == 0).sum() == 4
    assert Regression().weights(targets).tolist() == [3, 2, 3, 3, 0, 3]


def test_classification_is_cross_entropy() -> None:
    outputs, targets = randn(6, 5), randint(5, 6)
    objective = Classification()
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
        assert torch.equal(objective.losses(outputs, targets, smoothing), expected)
        summed = F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=smoothing)
        assert torch.equal(objective.loss(outputs, targets, smoothing), summed)
    assert objective.weights(targets).tolist() == [1] * 6
    assert torch.equal(objective.correct(outputs, targets), outputs.argmax(1) == targets)
    torch.testing.assert_close(objective.confidence(outputs), outputs.softmax(1).max(1).values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_factor_multiplies_logits_only(name: str) -> None:
    found = OBJECTIVES[name]().scaled(torch.ones(2, 3), 2.0)
    assert torch.equal(found, torch.ones(2, 3) if name == "regression" else torch.full((2, 3), 2.0))


class Distances(Objective):
    """The smallest objective of a user: losses alone."""

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return (outputs - targets).abs().sum(1)


def test_an_objective_needs_nothing_but_losses() -> None:
    own = objective_of(make_recipe({"model": "a:b", "objective": "tests.unit.task.test_objectives:Distances"}))
    outputs, targets = NUMBERS
    torch.testing.assert_close(own.loss(outputs, targets), F.l1_loss(outputs, targets, reduction="sum"))
    assert own.weights(targets).tolist() == [1] * 6
    assert own.correct(outputs, targets) is own.confidence(outputs) is own.check(outputs, targets) is None
    assert own.scaled(outputs, 3.0) is outputs
    assert own.of_members(own.member(outputs, targets), targets)[1] is None
    with pytest.raises(RecipeError, match=r"learn\.label_smoothing is 0\.1; the objective own has no classes"):
        check_smoothing(own, 0.1)


# Outputs that do not fit


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "said"),
    [
        ("classification", (1, 3, 5), (1,), r"float logits \[1, classes\]"),
        ("token_classification", (1, 5), (1, 9), r"float logits \[1, \.\.\., classes\] for targets \[1, 9\]"),
        ("causal_lm", (1, 8, 5), (1, 9), r"logits .* for targets \[1, 9\]"),
        ("segmentation", (1, 5, 4, 4), (1, 8, 8), r"\[1, classes, \.\.\.\] for targets \[1, 8, 8\]"),
        ("segmentation", (1, 300, 4, 4), (1, 4, 4), "at most 255 classes"),
        ("multi_label", (1, 5), (1, 4), r"one output for each of the targets \[1, 4\]"),
        ("regression", (1, 2), (1,), r"one output for each of the targets \[1\]"),
    ],
)
def test_outputs_that_do_not_fit_their_targets_are_described(name: str, outputs: Any, targets: Any, said: str) -> None:
    found = OBJECTIVES[name]().check(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))
    assert found is not None
    assert re.search(said, found), found


# Losses and metrics of a user, for targets that are not labels


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum", ignore_index=IGNORED)


def huber(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(outputs, targets, reduction="none").sum(1)


def mean_of_tokens(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED)


def each_token(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


def token_share(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(2) == targets).float().mean(1)


HERE = "tests.unit.task.test_objectives"


@pytest.mark.parametrize(
    ("objective", "loss", "examples", "expected"),
    [
        ("token_classification", "token_loss", TOKENS, lambda o, y: TokenClassification().loss(o, y)),
        ("regression", "huber", NUMBERS, lambda o, y: F.huber_loss(o, y, reduction="sum")),
    ],
)
def test_a_loss_of_the_user_replaces_that_of_the_objective(
    objective: str, loss: str, examples: tuple[torch.Tensor, torch.Tensor], expected: Any
) -> None:
    recipe = make_recipe({"model": "a:b", "objective": objective, "loss": f"{HERE}:{loss}"})
    outputs, targets = examples
    own = loss_of(recipe, objective_of(recipe), outputs[:1], targets[:1])
    torch.testing.assert_close(own(outputs, targets), expected(outputs, targets))


@pytest.mark.parametrize(
    ("loss", "said"), [("mean_of_tokens", "of three examples is"), ("each_token", r"returned \[3, 9\]")]
)
def test_a_loss_that_is_no_sum_over_examples_is_refused(loss: str, said: str) -> None:
    recipe = make_recipe({"model": "a:b", "objective": "causal_lm", "loss": f"{HERE}:{loss}"})
    with pytest.raises(RecipeError, match=said):
        loss_of(recipe, CausalLM(), TOKENS[0][:1], TOKENS[1][:1])


def test_a_metric_of_tokens_gives_one_score_per_example() -> None:
    recipe = make_recipe({"model": "a:b", "objective": "causal_lm", "metric": f"{HERE}:token_share"})
    found = metric_of(recipe, CausalLM(), TOKENS[0][:1], TOKENS[1][:1])
    assert found is not None
    torch.testing.assert_close(found(*TOKENS), token_share(*TOKENS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": f"{HERE}:huber"}, r"objective: .*:huber is no subclass of .*Objective"),
        ({"objective": f"{HERE}:Missing"}, "has no 'Missing'"),
        ({"objective": "ray_soup.task.objective:Objective"}, "ray_soup.task.objective:Objective raised TypeError"),
        ({"select_by": "metric"}, "select_by: metric needs a metric"),
        ({"objective": "regression", "learn": {"label_smoothing": 0.1}}, "no classes to smooth over"),
    ],
)
def test_an_objective_that_cannot_be_used_is_refused_at_the_start(changes: dict[str, Any], said: str) -> None:
    recipe = make_recipe({"model": "a:b", **changes})
    with pytest.raises(RecipeError, match=said):
        _ = check_functions(recipe), objective_of(recipe)


class Meaned(Distances):
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return super().losses(outputs, targets).mean()


class EachNumber(Distances):
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return (outputs - targets).abs()


class OfTheBatch(Distances):
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return super().losses(outputs, targets) / len(outputs)


class WithoutGradient(Distances):
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return super().losses(outputs, targets).detach()


class Failing(Distances):
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return outputs[:, :2] @ targets


class OneWeight(Distances):
    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.tensor(targets.numel())


class Unlike(Distances):
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return self.losses(outputs, targets).mean()


class OddTargets(Distances):
    targets = "words"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Meaned", r"losses returned \[\] for three examples; expected float losses \[3\]"),
        ("EachNumber", r"losses returned \[3, 3\] for three examples"),
        ("OfTheBatch", "the loss of an example is .* among three and .* alone"),
        ("Unlike", "`loss` of the three is"),
        ("WithoutGradient", "losses have no gradient"),
        ("Failing", r"Failing raised RuntimeError: (?s:.*)test_objectives\.py, line \d+, in losses: return outputs"),
        ("OneWeight", r"weights returned \[\] of torch.int64 for three examples; expected numbers \[3\]"),
        ("OddTargets", "has targets = 'words'; expected one of classes, units"),
    ],
)
def test_an_unsound_objective_of_the_user_is_refused(name: str, said: str) -> None:
    recipe = make_recipe({"model": "a:b", "objective": f"{HERE}:{name}"})
    outputs, targets = NUMBERS
    with pytest.raises(RecipeError, match=said):
        loss_of(recipe, objective_of(recipe), outputs[:1], targets[:1])


def with_scores(returned: Any) -> Any:
    return type("Scored", (Distances,), {"scores": lambda self, outputs, targets: returned(outputs)})


TensorInstead = with_scores(lambda o: o[:, 0])
Underscored = with_scores(lambda o: {"exact_match": o[:, 0]})
Reserved = with_scores(lambda o: {"nll": o[:, 0]})
Heading = with_scores(lambda o: {"Loss": o[:, 0]})
EachNumberScored = with_scores(lambda o: {"f1": o})
NotFinite = with_scores(lambda o: {"f1": o[:, 0] / 0})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("TensorInstead", r"scores returned \[3\]; expected a dictionary"),
        ("Underscored", "the name 'exact_match'; expected letters, digits and hyphens"),
        ("Reserved", "the name 'nll'; .* none of accuracy, loss, nll"),
        ("Heading", "the name 'Loss'; .* none of accuracy, loss, nll"),
        ("EachNumberScored", r"scores returned \[3, 3\] as f1 for 3 examples; expected numbers \[3\]"),
        ("NotFinite", "scores returned -?inf as f1; expected finite numbers"),
    ],
)
def test_unsound_scores_are_refused(name: str, said: str) -> None:
    recipe = make_recipe({"model": "a:b", "objective": f"{HERE}:{name}"})
    with pytest.raises(RecipeError, match=said):
        loss_of(recipe, objective_of(recipe), NUMBERS[0][:1], NUMBERS[1][:1])


OfSigns = with_scores(lambda o: {"positive" if o[0, 0] > 0 else "negative": o[:, 0]})


def test_scores_must_have_the_same_names_for_each_batch() -> None:
    own = objective_of(make_recipe({"model": "a:b", "objective": f"{HERE}:OfSigns"}))
    assert own.scores(torch.ones(1, 3), torch.ones(1, 3))["positive"].dtype == torch.float64
    with pytest.raises(RecipeError, match="scores returned the names negative, and positive before"):
        own.scores(-torch.ones(1, 3), torch.ones(1, 3))


MeanScore = with_scores(lambda o: {"hit": (o.argmax(1) == 0).double().mean().expand(len(o))})


def test_a_score_must_not_depend_on_other_examples() -> None:
    """Also if the examples of the check at the start are too alike to show it."""
    own = objective_of(make_recipe({"model": "a:b", "objective": f"{HERE}:MeanScore"}))
    for alike in (torch.ones(3, 2), torch.zeros(1, 2)):
        own.scores(alike, alike)
    with pytest.raises(RecipeError, match=r"the score hit of an example is 0\.6667 among 3 and 1 alone; expected equal"):
        own.scores(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.ones(3, 2))


class Joined(Distances):
    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        return model(inputs)


class FirstOfPair(Joined):
    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        return super().outputs(model, inputs)[0]["logits"]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": 2 * x}, x


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Distances", "returned tuple for one example of test"),
        ("Joined", "the outputs of Joined are tuple for one example of test, .*; expected one float tensor"),
        ("FirstOfPair", ""),
    ],
)
def test_an_objective_may_say_what_the_outputs_are(name: str, said: str) -> None:
    own = objective_of(make_recipe({"model": "a:b", "objective": f"{HERE}:{name}"}))
    model = build(f"{HERE}:Pair").model
    call_as(own, model)
    if said:
        with pytest.raises(RecipeError, match=said):
            outputs_of(model, NUMBERS[0][:1], NUMBERS[1][:1], own, "a:b", "test")
    else:
        found = outputs_of(model, NUMBERS[0][:1], NUMBERS[1][:1], own, "a:b", "test")
        assert torch.equal(found, 2 * NUMBERS[0][:1])


class Weighted(Classification):
    """Cross-entropy with weights of classes, divided by the sum of the weights, as torch does."""

    by_class = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, self.by_class, reduction="none")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return self.losses(outputs, targets).sum()

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        return self.by_class[targets]


def test_a_class_derived_from_a_built_in_objective_is_used_as_it_is() -> None:
    recipe = make_recipe({"model": "a:b", "objective": f"{HERE}:Weighted"})
    outputs, targets, own = randn(20, 5), torch.arange(20) % 5, objective_of(recipe)
    assert loss_of(recipe, own, outputs[:1], targets[:1])(outputs, targets) == own.losses(outputs, targets).sum()
    outcome = outcome_of(own, outputs, targets, factored=True)
    expected = F.cross_entropy(outputs, targets, Weighted.by_class)
    assert outcome.nll == pytest.approx(expected.item(), rel=1e-6)


def log_of_rates(rates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (rates - counts * rates.log()).sum(1)


def test_a_loss_of_positive_outputs_is_checked_on_positive_outputs() -> None:
    recipe = make_recipe({"model": "a:b", "objective": "regression", "loss": f"{HERE}:log_of_rates"})
    rates, counts = randn(6, 3).exp(), randint(5, 6, 3)
    found = loss_of(recipe, Regression(), rates[:1], counts[:1])(rates, counts)
    torch.testing.assert_close(found, F.poisson_nll_loss(rates, counts, log_input=False, reduction="sum", eps=0))
