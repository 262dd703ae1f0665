"""Tensors of a checkpoint that are evidently not part of the model: weights of losses, states of metrics, counters.

A training module stores them beside its network. Only names and shapes are known, so the lists are narrow: whatever could
take part in computing the outputs, such as a `scale` or a second head, is not on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ray_soup.io.formats import TensorInfo
from ray_soup.io.names import AVERAGES, TEACHERS, TEXT_TOWER, Candidate, ModelNames, unwrapped

_WHEN = r"(?:train|training|val|valid|validation|test|eval|epoch|step|macro|micro|weighted|at_\d+|\d+)"
LOSS = re.compile(
    r"(?i:(?:\w*_)?(?:loss|losses|criterion|criterions|criteria)(?:_?(?:fn|func|function|module|weights?))?)"
    rf"(?:_{_WHEN}|\d+)?|\w*Loss(?:es)?\d*"
)
"""Parts of names that belong to a loss: `criterion`, `loss_fn`, `train_loss`, `CrossEntropyLoss`."""
SCALES = re.compile(r"(?i:(?:\w*_)?(?:scale|temperature|temp|tau|bias|shift))")
"""Last parts of names that may scale or shift the outputs of a model, although they belong to its loss."""
METRIC = re.compile(
    r"(?i:(?:\w*_)?(?:metrics?|acc|accuracy|top_?\d+|f1|f1_?score|f_?beta|auroc|auc|average_precision|precision|recall"
    r"|specificity|m?iou|jaccard|jaccard_?index|dice|conf_?mat|confusion_?matrix|mae|mse|rmse|r2|r2_?score|mape|pearson"
    r"|spearman|cohen_?kappa|kappa|mcc|perplexity|ppl|bleu|rouge|wer|cer|ece|calibration_?error|hamming|exact_?match"
    rf"|stat_?scores|loss)(?:_?metrics?)?)(?:_{_WHEN}|\d+)?"
    r"|(?:Binary|Multiclass|Multilabel)?(?:Accuracy|Precision|Recall|F1Score|AUROC|ConfusionMatrix|JaccardIndex|MeanMetric"
    r"|MeanSquaredError|MeanAbsoluteError|R2Score|Perplexity|StatScores|CalibrationError|Dice)"
)
"""Parts of names that belong to a metric: `train_acc`, `val_metrics`, `MulticlassF1Score`."""
COUNTS = ("tp", "fp", "tn", "fn", "confmat")
"""States of metrics with a number per class, or per pair of classes."""
SUMS = (
    "correct", "total", "n_total", "sum_value", "mean_value", "max_value", "min_value", "value", "weight", "num_examples",
    "sum_error", "sum_squared_error", "sum_abs_error", "sum_squared_obs", "total_log_probs", "count", "errors", "score",
)  # fmt: skip
"""States of metrics that are single numbers."""
COUNTERS = ("num_updates", "initted", "step", "global_step", "num_steps")
"""Integers at the top level that count the steps of a training or of an average of models."""


def is_beside_a_model(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor that the model lacks evidently belongs to a loss, to a metric, or to an average of models."""
    *above, last = name.split(".")
    if last == "n_averaged":  # torch.optim.swa_utils.AveragedModel
        return True
    if last in COUNTERS and not above:
        return info.numel <= 1 and not info.dtype.is_floating_point
    if any(map(METRIC.fullmatch, above)):
        if last in COUNTS and (last == "confmat" or len(info.shape) <= 1):
            return True
        if last in SUMS and info.numel <= 1:
            return True
    of_loss = any(map(LOSS.fullmatch, (*above, last))) or last in ("pos_weight", "pos_weights")
    return of_loss and len(info.shape) <= 1 and not SCALES.fullmatch(last)


class LeftOut:
    """The tensors that a match leaves out, by the reason."""

    def __init__(self, used: Candidate, model: ModelNames, others: tuple[Candidate, ...]) -> None:
        self.names: list[str] = []
        self._used, self._model, self._others = used, model, others
        self._prefix = used.in_file(model)
        self._towers: list[str] = []
        self._ignored: list[str] = []
        self._beside: list[str] = []
        self._is_outside = False
        self._copies: dict[str, list[str]] = {}

    def take(self, name: str, in_file: str, info: TensorInfo) -> bool:
        """Leave out a tensor below the prefix if something allows that; `name` is its name there."""
        if self._model.expects_no(name, in_file):
            if self._model.image_only and TEXT_TOWER.match(name):
                self._towers.append(name)
        elif self._model.ignores(name, in_file):
            self._ignored.append(name)
        elif not self._is_evident(name, in_file, info):
            return False
        self.names.append(name if in_file.endswith(name) else in_file)
        return True

    def take_outside(self, in_file: str, info: TensorInfo) -> bool:
        """Leave out a tensor that is not below the prefix if something allows that."""
        if self._model.ignores(in_file, in_file):
            self._ignored.append(in_file)
        elif not self._is_evident(unwrapped(in_file), in_file, info):
            return False
        self.names.append(in_file)
        return True

    def _is_evident(self, name: str, in_file: str, info: TensorInfo) -> bool:
        """Return whether a tensor belongs to another copy of the model, an average of it or its teacher, or to no model."""
        bare = unwrapped(in_file)
        copy = next((c.in_file(self._model) for c in self._others if c.prefix and bare.startswith(c.prefix)), "")
        first, dot, _ = name.partition(".")
        role = AVERAGES.fullmatch(first) or (self._used.is_plain and TEACHERS.fullmatch(first))
        if dot and role and not copy and not self._used.prefix.startswith(f"{first}."):
            copy = f"{in_file.partition(f'{first}.')[0]}{first}."
        if copy:
            self._copies.setdefault(copy, []).append(in_file)
        elif is_beside_a_model(name, info):
            self._beside.append(name)
            self._is_outside = self._is_outside or not in_file.startswith(self._prefix)
        else:
            return False
        return True

    def remarks(self) -> Iterator[str]:
        """Say what was left out, without the name of the file."""
        if self._towers:
            yield (
                f"The text tower ({len(self._towers)} tensors, such as {self._towers[0]}) was left out: the model has none."
            )
        if self._ignored:
            yield f"{some(self._ignored)} left out because of `ignore:`."
        if self._beside:
            where = f" outside `{self._prefix}`" if self._is_outside else ""
            yield f"{some(self._beside)}{where} {_were(self._beside)} left out: the model has none."
        whole = [c.in_file(self._model) for c in self._others]
        for prefix, names in self._copies.items():
            place = f"under `{self._prefix}`" if self._prefix else "at its top level"
            if prefix in whole:
                yield (
                    f"it contains the whole model {place} and under `{prefix}`. The first was used; append "
                    f"?key={prefix.rstrip('.')} to the path to use the other."
                )
            else:
                yield f"{len(names)} tensor{'s' * (len(names) > 1)} under `{prefix}` {_were(names)} left out: not the model."


def _were(names: list[str]) -> str:
    return "were" if len(names) > 1 else "was"


def groups_of(names: Iterable[str]) -> list[str]:
    """Return the groups that names belong to, as patterns: `criterion.*`, and `scale` for a name without a dot."""
    return list(dict.fromkeys(name.partition(".")[0] + ".*" if "." in name else name for name in names))


def some(names: list[str]) -> str:
    """Return the number of names, and the groups that they belong to."""
    groups = groups_of(names)
    more = ", ..." if len(groups) > 4 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(groups[:4])}{more})"
