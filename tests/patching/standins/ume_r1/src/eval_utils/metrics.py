"""Scores of rankings."""

from __future__ import annotations

from typing import Any


class RankingMetrics:
    def __init__(self, metrics: list[str]) -> None:
        self.metrics = metrics

    def evaluate(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        hits = [p["prediction"][0] in p["label"] for p in predictions]
        return {"hit@1": sum(hits) / len(hits)}
