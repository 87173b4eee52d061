"""MMEB-V1 with the content of the image tasks, and two tasks of composed retrieval of M-BEIR."""

from __future__ import annotations

import json

from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.image_tasks import image_rows
from ume_models.mmeb.miniature.material import again_of, pools
from ume_models.mmeb.mmeb_v1 import MMEB_V1

_QUERIES = 8
_CANDIDATES = 14
_COMPOSED = (
    # task, number of its data set, pool, text of the queries, instructions
    ("fashioniq_task7", 7, "digits_i2i", "is in another hand",
     ("Find me another image of the same handwritten number.", "Find the same number again.")),
    ("cirr_task7", 8, "scene_i2i", "the same things a little further apart",
     ("Find me another image of the same scene.", "Find the same scene once more.")),
)  # fmt: skip


def write_mmeb_v1(folder: DataFolder) -> None:
    """Tables and pictures of MMEB-V1: instructions and texts are one, on both sides."""
    for task in MMEB_V1:
        rows = image_rows(folder, task.name, "MMEB-eval/eval_images")
        joined = [
            {
                "qry_text": f"{row['qry_inst']} {row['qry_text']}".rstrip() + "\n",
                "qry_img_path": row["qry_img_path"],
                "tgt_text": [f"{row['tgt_inst']} {text}".strip() for text in row["tgt_text"]],
                "tgt_img_path": row["tgt_img_path"],
            }
            for row in rows
        ]
        folder.table("MMEB-eval", task.name, "test", joined)


def write_mbeir(folder: DataFolder) -> None:
    """Two tasks that ask with a picture and a text; one of the queries has two answers."""
    instructions = [
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"
    ]
    for name, dataset, pool, text, wordings in _COMPOSED:
        _composed(folder, name, dataset, pool, text)
        columns = ["image,text", "image", name.split("_")[0], str(dataset), *wordings, ""]
        instructions.append("\t".join(columns))
    folder.text("M-BEIR/instructions/query_instructions.tsv", "\n".join(instructions) + "\n")


def _composed(folder: DataFolder, name: str, dataset: int, pool: str, text: str) -> None:
    rng = folder.rng(f"M-BEIR/{name}")
    asked, ranked = pools()[pool].draw(rng, _QUERIES, _CANDIDATES, again_of)
    images = f"mbeir_images/{name.split('_')[0]}_images"
    collection, number_of = [], {}
    for number, thing in enumerate(ranked):
        did = number_of[thing.id] = f"{dataset}:{number + 1}"
        path = f"{images}/{thing.id}.jpg"
        folder.picture(f"M-BEIR/{path}", thing.again[0], "jpeg" if number == 0 else None)
        collection.append(
            {"did": did, "txt": None, "img_path": path, "modality": "image",
             "src_content": json.dumps({"name": thing.id})}
        )  # fmt: skip
    queries, judgements = [], []
    for number, thing in enumerate(asked):
        qid = f"{dataset}:{number + 1000}"
        path = f"{images}/{thing.id}-query.jpg"
        folder.picture(f"M-BEIR/{path}", thing.shown[0])
        answers = [number_of[thing.id]]
        if number == 3:  # the very picture of the query lies in the collection as well
            collection.append(
                {"did": f"{dataset}:99", "txt": None, "img_path": path, "modality": "image",
                 "src_content": None}
            )  # fmt: skip
            answers.append(f"{dataset}:99")
        queries.append(
            {"qid": qid, "query_txt": text, "query_img_path": path, "query_modality": "image,text",
             "query_src_content": None, "pos_cand_list": answers, "neg_cand_list": []}
        )  # fmt: skip
        judgements += [f"{qid} 0 {answer} 1 7\n" for answer in answers]
    folder.jsonl(f"M-BEIR/query/test/mbeir_{name}_test.jsonl", queries)
    folder.jsonl(f"M-BEIR/cand_pool/local/mbeir_{name}_cand_pool.jsonl", collection)
    folder.text(f"M-BEIR/qrels/test/mbeir_{name}_test_qrels.txt", "".join(judgements))
