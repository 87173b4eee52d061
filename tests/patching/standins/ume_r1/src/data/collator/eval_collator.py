"""Rows of a dataset to a batch."""

from __future__ import annotations

from typing import Any

PROMPT = "\n<disc_emb>\nRepresent the above input."


class MultimodalEvalDataCollator:
    """Left-padded inputs of one side, with what is known about each row."""

    def __init__(self, processor: Any, model_args: Any, data_args: Any, encode_side: str) -> None:
        self.processor, self.encode_side = processor, encode_side

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        side = "query" if self.encode_side == "qry" else "cand"
        texts = [row[f"{side}_text"] + PROMPT for row in rows]
        batch = self.processor(texts, [row[f"{side}_image"] for row in rows])
        return {**batch, "texts": texts, "images": None}, [row["dataset_infos"] for row in rows]
