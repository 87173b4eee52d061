"""The 16 tasks of M-BEIR: queries, collections, judgements and instructions in files of their own.

Texts, pictures or both stand on either side, as the number of the task says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ume_models.mmeb.mbeir import MBEIR, MODALITIES, task_number
from ume_models.mmeb.miniature.folder import Change, DataFolder
from ume_models.mmeb.miniature.material import Thing, again_of, caption_of, pools, shown_of

_QUERIES = 8
_WORDINGS = 4
# As published; the number of a data set is its position.
_DATASETS = (
    "VisualNews", "Fashion200K", "WebQA", "EDIS", "NIGHTS", "OVEN", "INFOSEEK", "FashionIQ",
    "CIRR", "MSCOCO",
)  # fmt: skip
_NUMBERS = {name.lower(): number for number, name in enumerate(_DATASETS)}
# Judgements of these name documents of both collections, only one of which is the task's.
_JUDGED_TOGETHER = {"oven": (6, 5), "infoseek": (5, 6)}
_IMAGE_OF_CAPTION = "Find me an image that matches the given caption."
_CAPTION_OF_IMAGE = "Find an image caption describing the given image."
_PAGE_OF_QUERY = "Find a document image that matches the given query:"
_NUMBER_IN_IMAGE = "Identify the handwritten number in the image."
_SAME_SCENE = "Find me another image of the same scene."
_SAME_NUMBER = "Find me another image of the same handwritten number."


@dataclass(frozen=True)
class _Plan:
    """What one task asks for.

    Attributes:
        pool: where its things come from.
        instructions: up to four wordings.
        text: what queries say; ``{}`` stands for the caption.
        documents: what candidates say; a thing has as many candidates as there are texts.
        things: how many are ranked.
    """

    pool: str
    instructions: tuple[str, ...]
    text: str = "{}"
    documents: tuple[str, ...] = ("{}",)
    things: int = 24


# Most of the first wordings, which are used, are those that the tiny checkpoint was trained with.
_PLANS: dict[str, _Plan] = {
    "visualnews_task0": _Plan("scene_t2i", (
        _IMAGE_OF_CAPTION, "Show me the photo that this news caption is about.",
        "Which photo stands above this caption?", "Find the photo for the news.",
    )),
    "mscoco_task0": _Plan("scene_t2i", ("Show what this caption describes.", _IMAGE_OF_CAPTION)),
    "fashion200k_task0": _Plan("chart_t2p", (_PAGE_OF_QUERY,)),
    "webqa_task1": _Plan("page_t2p", ("Find a text that answers this question.", "Answer this."),
                         documents=("the {}",)),
    "edis_task2": _Plan("scene_t2i", (_IMAGE_OF_CAPTION, "Find the news for this caption."),
                        documents=("in the news today",)),
    "webqa_task2": _Plan("page_t2p", ("Which page answers this?", "Find a page.", _PAGE_OF_QUERY),
                         documents=("a page",)),
    "visualnews_task3": _Plan("scene_i2t", (_CAPTION_OF_IMAGE, "What is the news here?")),
    "mscoco_task3": _Plan("scene_i2t", (_CAPTION_OF_IMAGE,), documents=("{}", "there is {}")),
    "fashion200k_task3": _Plan("digits_i2t", (_NUMBER_IN_IMAGE, "Describe this.")),
    "nights_task4": _Plan("scene_i2i", (_SAME_SCENE, "Find a picture that looks like this one.")),
    "oven_task6": _Plan("digits_i2t", (_NUMBER_IN_IMAGE, "Find the article about this."),
                        "which number is this?"),
    "infoseek_task6": _Plan("digits_i2t", (_NUMBER_IN_IMAGE, "Find a text with the answer."),
                            "what is written here?", ("{}. this is written by hand",)),
    "fashioniq_task7": _Plan("digits_i2i", (_SAME_NUMBER, "Find the same number again."),
                             "is in another hand", things=14),
    "cirr_task7": _Plan("scene_i2i", (_SAME_SCENE, "Find the same scene once more."),
                        "the same things a little further apart", things=14),
    "oven_task8": _Plan("scene_i2i", (_SAME_SCENE, "Find the article about this."),
                        "what is this?", ("an article",)),
    "infoseek_task8": _Plan("scene_i2i", (_SAME_SCENE, "Find a text with the answer."),
                            "where are the two things?", ("what is known about it",)),
}  # fmt: skip


def write_mbeir(folder: DataFolder) -> None:
    """All tasks of M-BEIR; its tables are JSON lines whatever form others have."""
    columns = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    lines = [[*columns, *(f"prompt_{number + 1}" for number in range(_WORDINGS))]]
    for task in MBEIR:
        writer = _Writer(folder, task.name)
        writer.write()
        lines.append(writer.instructions())
    text = "".join("\t".join(line) + "\n" for line in lines)
    folder.text("M-BEIR/instructions/query_instructions.tsv", text)


class _Writer:
    """One task.

    Args:
        folder: where to write.
        name: of the task.
    """

    def __init__(self, folder: DataFolder, name: str) -> None:
        self.folder, self.name, self.plan = folder, name, _PLANS[name]
        self.number = task_number(name)
        self.asks, self.finds, _ = MODALITIES[self.number]
        self.prefix = name.split("_")[0]
        self.dataset = _NUMBERS[self.prefix]
        # Ids are unique in the data set, which may have another task.
        siblings = [task.name for task in MBEIR if task.name.startswith(f"{self.prefix}_")]
        self.start = 100 * siblings.index(name)
        pool = pools()[self.plan.pool]
        self.picture_of = again_of if pool.whole[0].again else shown_of
        has = self.picture_of if "image" in self.finds else caption_of
        # InfoSeek asks about the pictures of OVEN.
        rng = folder.rng(f"M-BEIR/{name.replace('infoseek', 'oven')}")
        self.asked, self.ranked = pool.draw(rng, _QUERIES, self.plan.things, has)

    def instructions(self) -> list[str]:
        """The row of the table of instructions."""
        wordings = [*self.plan.instructions, *[""] * _WORDINGS][:_WORDINGS]
        return [self.asks, self.finds, _DATASETS[self.dataset], str(self.dataset), *wordings]

    def write(self) -> None:
        """The three tables of the task, and the pictures they name."""
        collection, documents = self._collection()
        queries, judgements = [], []
        for position, thing in enumerate(self.asked):
            path = None
            if "image" in self.asks:
                path = self._picture(f"{thing.id}-query", thing.shown[0])
            if position == 3 and path and "image" in self.finds:
                # The very picture of the query lies in the collection as well.
                documents[thing.id].append(self.start + 99)
                text = self.plan.documents[0]
                collection.append(self._candidate(self.start + 99, text, path, None))
            query = self._query(position, thing, path, documents[thing.id])
            queries.append(query)
            judgements += [f"{query['qid']} 0 {answer} 1 {self.number}\n"
                           for answer in query["pos_cand_list"]]  # fmt: skip
        # Only MSCOCO has collections of its own for validation and test.
        split = "_test" if self.prefix == "mscoco" else ""
        pool = f"M-BEIR/cand_pool/local/mbeir_{self.name}{split}_cand_pool.jsonl"
        self.folder.jsonl(pool, collection)
        self.folder.jsonl(f"M-BEIR/query/test/mbeir_{self.name}_test.jsonl", queries)
        qrels = f"M-BEIR/qrels/test/mbeir_{self.name}_test_qrels.txt"
        self.folder.text(qrels, "".join(judgements))

    def _collection(self) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
        """Candidates, and the numbers of those of each thing."""
        collection: list[dict[str, Any]] = []
        documents: dict[str, list[int]] = {}
        for position, thing in enumerate(self.ranked):
            path = None
            if "image" in self.finds:
                change: Change | None = "jpeg" if position == 0 else None
                path = self._picture(thing.id, self.picture_of(thing)[0], change)
            source = json.dumps({"name": thing.id})
            for document in self.plan.documents:
                number = self.start + len(collection) + 1
                documents.setdefault(thing.id, []).append(number)
                text = document.format(_statement(thing.caption))
                collection.append(self._candidate(number, text, path, source))
        return collection, documents

    def _query(
        self, position: int, thing: Thing, path: str | None, numbers: Sequence[int]
    ) -> dict[str, Any]:
        datasets = _JUDGED_TOGETHER.get(self.prefix, (self.dataset,))
        return {
            "qid": f"{self.dataset}:{self.start + position + 1000}",
            "query_txt": self.plan.text.format(thing.caption) if "text" in self.asks else None,
            "query_img_path": path,
            "query_modality": self.asks,
            "query_src_content": None,
            "pos_cand_list": [f"{dataset}:{number}" for dataset in datasets for number in numbers],
            "neg_cand_list": [],
        }

    def _candidate(
        self, number: int, text: str, path: str | None, source: str | None
    ) -> dict[str, Any]:
        return {
            "did": f"{self.dataset}:{number}",
            "txt": text if "text" in self.finds else None,
            "img_path": path,
            "modality": self.finds,
            "src_content": source,
        }

    def _picture(self, name: str, source: Path, change: Change | None = None) -> str:
        """Write a picture; its path as it stands in the tables."""
        folder = self.prefix.replace("infoseek", "oven")
        path = f"mbeir_images/{folder}_images/{name}.jpg"
        self.folder.picture(f"M-BEIR/{path}", source, change)
        return path


def _statement(caption: str) -> str:
    """What a question about a page asks for, told; other captions as they are."""
    return caption.removeprefix("which ").rstrip("?")
