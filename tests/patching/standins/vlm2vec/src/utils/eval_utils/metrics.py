class RankingMetrics:
    def __init__(self, metric_list=("hit",)):
        self.metric_list = metric_list

    def evaluate(self, pred_dicts):
        hits = [bool(set(p["prediction"][:1]) & set(p["label"])) for p in pred_dicts]
        return {"hit@1": sum(hits) / len(hits)}
