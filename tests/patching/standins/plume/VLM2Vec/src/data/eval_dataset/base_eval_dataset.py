"""Queries and candidates from JSON lines, in the columns of the official datasets."""

import json


class Dataset(list):
    """What the script uses of ``datasets.Dataset``."""

    @property
    def num_rows(self):
        return len(self)

    def select(self, indices):
        return Dataset(self[i] for i in indices)


def concatenate_datasets(parts):
    return Dataset(row for part in parts for row in part)


def split_dataset_by_node(dataset, rank, world_size):
    size = len(dataset) // world_size
    return Dataset(dataset[rank * size : (rank + 1) * size])


def _image(path):
    return {"bytes": [None], "paths": [path], "resolutions": [None]} if path else None


def _lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


class AutoEvalPairDataset:
    registry = {}  # noqa: RUF012

    @classmethod
    def instantiate(cls, dataset_parser, *args, **kwargs):
        return cls.registry[dataset_parser](*args, **kwargs)

    @classmethod
    def register(cls, dataset_name):
        def inner_wrapper(function):
            cls.registry[dataset_name] = function
            return function

        return inner_wrapper


@AutoEvalPairDataset.register("jsonl")
def load_jsonl(model_args, data_args, data_path, corpus_path, **kwargs):
    """Queries ``{text, image?, label, candidates}``, candidates ``{name, text, image?}``."""
    queries = Dataset(
        {
            "query_text": [line["text"]],
            "query_image": [_image(line.get("image"))],
            "cand_text": [],
            "cand_image": [],
            "dataset_infos": {
                "cand_names": line.get("candidates", []),
                "label_name": line["label"],
            },
        }
        for line in _lines(data_path)
    )
    corpus = Dataset(
        {
            "cand_text": [line["text"]],
            "cand_image": [_image(line.get("image"))],
            "dataset_infos": {"cand_names": [line["name"]]},
        }
        for line in _lines(corpus_path)
    )
    return queries, corpus


def generate_cand_dataset(dataset, corpus):
    rows, seen = Dataset(), set()
    for row in corpus:
        name = row["dataset_infos"]["cand_names"][0]
        if name not in seen:
            seen.add(name)
            rows.append({**row, "dataset_infos": {"cand_name": name}})
    return rows
