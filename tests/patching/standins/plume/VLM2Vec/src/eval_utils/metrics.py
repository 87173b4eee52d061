"""Scores of rankings."""

import math


class RankingMetrics:
    def __init__(self, metric_list, k_list=(1, 5, 10)):
        self.metric_list = metric_list
        self.k_list = sorted(k_list)

    def evaluate(self, pred_dicts):
        found = {}
        for k in self.k_list:
            for name in self.metric_list:
                values = [getattr(self, f"{name}_at_k")(p, k) for p in pred_dicts]
                found[f"{name}@{k}"] = sum(values) / len(values)
        return found

    def hit_at_k(self, pred, k):
        return float(any(name in pred["label"] for name in pred["prediction"][:k]))

    def ndcg_at_k(self, pred, k):
        gains = [name in pred["label"] for name in pred["prediction"][:k]]
        best = range(min(k, len(pred["label"])))
        ideal = sum(1 / math.log2(i + 2) for i in best)
        return sum(g / math.log2(i + 2) for i, g in enumerate(gains)) / ideal
