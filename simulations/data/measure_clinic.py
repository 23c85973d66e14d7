"""Measures the clinic messages: label mix, difficulty for a linear model, similarity of parts.

Run ``python -m simulations.data.measure_clinic`` (needs scikit-learn). The figures in README.md
beside this file are its output.
"""

from __future__ import annotations

import json
from collections import Counter

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from simulations.data.make_clinic import FOLDER, LABELS, Neighbours, normal

PENALTIES = (0.1, 1.0, 10.0, 100.0)


def load(part: str) -> list[dict[str, str]]:
    """Reads one part of the data set."""
    with (FOLDER / f"{part}.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def linear_accuracy(train: list[dict[str, str]], test: list[dict[str, str]]) -> dict[float, float]:
    """Returns the test accuracy of TF-IDF with logistic regression for each value of C."""
    scores: dict[float, float] = {}
    for penalty in PENALTIES:
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=penalty, max_iter=2000))
        model.fit([row["text"] for row in train], [row["label"] for row in train])
        scores[penalty] = float(model.score([row["text"] for row in test], [row["label"] for row in test]))
    return scores


def main() -> None:
    """Prints all figures."""
    parts = {part: load(part) for part in ("train", "test")}
    for part, rows in parts.items():
        print(f"{part}: {len(rows)} rows")
        print("| site | rows | " + " | ".join(LABELS) + " |")
        print("|---|---" + "|---" * len(LABELS) + "|")
        for site in dict.fromkeys(row["site"] for row in rows):
            counts = Counter(row["label"] for row in rows if row["site"] == site)
            cells = " | ".join(str(counts[label]) for label in LABELS)
            print(f"| {site} | {sum(counts.values())} | {cells} |")
        total = Counter(row["label"] for row in rows)
        print(f"| all | {len(rows)} | " + " | ".join(str(total[label]) for label in LABELS) + " |")
        label, count = total.most_common(1)[0]
        print(f"majority class: {label}, {count / len(rows):.1%}")
        lengths = [len(row["text"].split()) for row in rows]
        mean = sum(lengths) / len(lengths)
        print(f"words per message: mean {mean:.1f}, from {min(lengths)} to {max(lengths)}")
        print(f"distinct completions: {len({row['completion'] for row in rows})}")
    texts = [normal(row["text"]) for rows in parts.values() for row in rows]
    print(f"exact duplicates in both parts together: {len(texts) - len(set(texts))}")
    neighbours = Neighbours()
    for row in parts["train"]:
        neighbours.add(row["text"])
    nearest = [neighbours.nearest(row["text"]) for row in parts["test"]]
    print(f"highest train-test similarity (Jaccard, 3-word runs): {max(nearest):.3f}")
    print(f"mean of the nearest: {sum(nearest) / len(nearest):.3f}")
    scores = linear_accuracy(parts["train"], parts["test"])
    listed = ", ".join(f"C={penalty:g}: {score:.1%}" for penalty, score in scores.items())
    print(f"TF-IDF (1-2 grams) with logistic regression, test accuracy: {listed}")
    print(f"best: {max(scores.values()):.1%}")


if __name__ == "__main__":
    main()
