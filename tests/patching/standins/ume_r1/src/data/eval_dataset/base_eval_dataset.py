"""Queries from a JSON-lines file, and the candidates they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Dataset(list[dict[str, Any]]):
    @property
    def num_rows(self) -> int:
        return len(self)


class AutoEvalPairDataset:
    @staticmethod
    def instantiate(
        model_args: Any, data_args: Any, data_path: str, **config: Any
    ) -> tuple[Dataset, None]:
        rows = Dataset()
        for line in Path(data_path).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            infos = {"cand_names": item["candidates"], "label_name": item["label"]}
            rows.append(
                {
                    "query_text": item["text"],
                    "query_image": item.get("image"),
                    "dataset_infos": infos,
                }
            )
        return rows, None


def generate_cand_dataset(dataset: Dataset, corpus: Any) -> Dataset:
    names = dict.fromkeys(name for row in dataset for name in row["dataset_infos"]["cand_names"])
    return Dataset(
        {"cand_text": name, "cand_image": None, "dataset_infos": {"cand_name": name}}
        for name in names
    )
