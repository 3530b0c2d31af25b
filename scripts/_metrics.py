"""Metrics as `evaluate.Metric`s that need no download."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import evaluate
from datasets import Features, List, Value
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn


class LocalMetric(evaluate.Metric):
    """A metric that is computed in memory.

    Attributes:
        features: Of predictions and references.
    """

    features: Features

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=self.features)


class Labels(LocalMetric):
    """Accuracy and macro F1 of one label per document."""

    features = Features({"predictions": Value("int64"), "references": Value("int64")})

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "accuracy": float(sklearn.accuracy_score(references, predictions)),
            "macro_f1": float(sklearn.f1_score(references, predictions, average="macro", zero_division=0)),
        }


class LabelSets(LocalMetric):
    """Micro F1, macro F1 and the share of exact sets, of 0 or 1 for each label that a document may have."""

    features = Features({"predictions": List(Value("int64")), "references": List(Value("int64"))})

    def _compute(self, predictions: Sequence[list[int]], references: Sequence[list[int]]) -> dict[str, float]:
        one = len(references[0]) == 1  # which scikit-learn takes for the classes 0 and 1
        labels = [1] if one else None
        return {
            "micro_f1": float(
                sklearn.f1_score(references, predictions, labels=labels, average="micro", zero_division=0)
            ),
            "macro_f1": float(
                sklearn.f1_score(references, predictions, labels=labels, average="macro", zero_division=0)
            ),
            "accuracy": float(sklearn.accuracy_score(references, predictions)),
        }


class Numbers(LocalMetric):
    """Mean absolute error and root of the mean squared error."""

    features = Features({"predictions": Value("float64"), "references": Value("float64")})

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {
            "mae": float(sklearn.mean_absolute_error(references, predictions)),
            "rmse": float(sklearn.root_mean_squared_error(references, predictions)),
        }


class Entities(LocalMetric):
    """Precision, recall and F1 of whole entities, from tags such as B-PER and I-PER; accuracy of the tags."""

    features = Features({"predictions": List(Value("string")), "references": List(Value("string"))})

    def _compute(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        return {
            "precision": float(seqeval.precision_score(references, predictions, zero_division=0)),
            "recall": float(seqeval.recall_score(references, predictions, zero_division=0)),
            "f1": float(seqeval.f1_score(references, predictions, zero_division=0)),
            "accuracy": float(seqeval.accuracy_score(references, predictions)),
        }


class Answers(LocalMetric):
    """Exact match and F1 of words, the best over the right answers, as SQuAD has them (Rajpurkar et al., 2018).

    No answer is the empty string, and right if there are no right answers.
    """

    features = Features({"predictions": Value("string"), "references": List(Value("string"))})

    def _compute(self, predictions: Sequence[str], references: Sequence[list[str]]) -> dict[str, float]:
        exact, f1 = 0.0, 0.0
        for prediction, answers in zip(predictions, references, strict=True):
            words = answer_words(prediction)
            right = [answer_words(answer) for answer in answers] or [[]]
            exact += max(words == answer for answer in right)
            f1 += max(_f1(words, answer) for answer in right)
        return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


def answer_words(text: str) -> list[str]:
    """The words of an answer that count: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))
