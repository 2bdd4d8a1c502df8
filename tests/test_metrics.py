import numpy as np
import pytest

from qgalore.evaluation import metrics


def pairs(classes, rows=200, seed=0):
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes, rows)
    predicted = np.where(generator.random(rows) < 0.6, true, generator.integers(0, classes, rows))
    return predicted, true


def test_known_values():
    """Three hits of five; for class 1 two hits, one miss, one false alarm: precision = recall = 2/3."""
    predicted, true = np.array([1, 1, 0, 1, 0]), np.array([1, 1, 0, 0, 1])
    assert metrics.accuracy(predicted, true) == pytest.approx(0.6)
    assert metrics.f1(predicted, true) == pytest.approx(2 / 3)


def test_matthews_of_two_classes_is_their_correlation():
    predicted, true = pairs(2)
    assert metrics.matthews(predicted, true) == pytest.approx(np.corrcoef(predicted, true)[0, 1])


def test_several_classes():
    """Names of classes do not matter; macro F1 is the mean of each class against the rest."""
    predicted, true = pairs(4)
    renamed = np.array([2, 0, 3, 1])
    assert metrics.matthews(renamed[predicted], renamed[true]) == pytest.approx(metrics.matthews(predicted, true))
    each = [metrics.f1((predicted == c).astype(int), (true == c).astype(int)) for c in range(4)]
    assert metrics.f1(predicted, true) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize("classes", [2, 3])
def test_perfect_predictions(name, classes):
    true = pairs(classes)[1]
    assert metrics.compute([name], true, true) == {name: pytest.approx(1)}


def test_correlations():
    """Pearson sees lines only, Spearman any rising curve."""
    true = np.linspace(0, 5, 30, dtype=np.float32)
    found = metrics.compute(["pearson", "spearman"], np.exp(3 * true), true)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(np.exp(3 * true.astype(float)), true)[0, 1], abs=1e-5)
    assert found["pearson"] < 0.9


def test_where_they_are_not_defined():
    ones, mixed = np.ones(4, dtype=int), np.array([0, 1, 1, 0])
    assert metrics.matthews(ones, mixed) == 0
    assert metrics.f1(np.zeros(4, dtype=int), mixed) == 0
    assert metrics.compute(["pearson", "spearman"], ones, mixed) == {"pearson": None, "spearman": None}
