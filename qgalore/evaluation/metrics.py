"""Figures for classifiers and regressions: GLUE's accuracy, F1, Matthews correlation, Pearson and Spearman."""

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float | None]


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of class ids (n,) that are right."""
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """2 · precision · recall / (precision + recall) of class 1 where there are two classes, else the mean over all
    classes; 0 for a class that is neither there nor predicted."""
    classes = max(int(predicted.max()), int(true.max()), 1) + 1
    scores = []
    for wanted in [1] if classes == 2 else range(classes):
        hits = int(((predicted == wanted) & (true == wanted)).sum())
        named = int((predicted == wanted).sum() + (true == wanted).sum())
        scores.append(2 * hits / named if named else 0.0)
    return float(np.mean(scores))


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation of class ids, for any number of classes (Gorodkin 2004); 0 if all predictions, or all classes, are
    the same."""
    classes = max(int(predicted.max()), int(true.max())) + 1
    counts = np.zeros((classes, classes))
    np.add.at(counts, (true, predicted), 1)
    n, hits, of_true, of_predicted = counts.sum(), np.trace(counts), counts.sum(1), counts.sum(0)
    spread = (n**2 - (of_predicted**2).sum()) * (n**2 - (of_true**2).sum())
    return float((hits * n - of_true @ of_predicted) / np.sqrt(spread)) if spread > 0 else 0.0


def _correlation(kind: str) -> Metric:
    def correlation(predicted: np.ndarray, true: np.ndarray) -> float | None:
        """None where it is not defined: constant predictions or labels, or fewer than two."""
        if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
            return None
        from scipy import stats  # a second to import

        function = stats.pearsonr if kind == "pearson" else stats.spearmanr
        return float(function(predicted.astype(np.float64), true.astype(np.float64)).statistic)

    return correlation


OF_CLASSES: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
OF_NUMBERS: dict[str, Metric] = {"pearson": _correlation("pearson"), "spearman": _correlation("spearman")}


def compute(names: Sequence[str], predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """The named figures of predictions (n,): class ids or numbers, as the names ask."""
    known = OF_CLASSES | OF_NUMBERS
    return {name: known[name](predicted, true) for name in names}
