"""The 36 image tasks: rows with instructions, and each query's candidates, the answer first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ume_models.mmeb.miniature.folder import Change, DataFolder
from ume_models.mmeb.miniature.material import (
    Thing,
    again_of,
    caption_of,
    pools,
    shown_of,
)
from ume_models.mmeb.mmeb_v2 import MMEB_V2

_QUERIES = 6
_CANDIDATES = 9
_IMAGE = "<|image_1|>\n"
_CLASSIFY = f"{_IMAGE}Represent the given image for classification"
_ANSWER = f"{_IMAGE}Represent the given image with the following question:"
_DESCRIBE = f"{_IMAGE}Find an image caption describing the given image."
_PICTURE = f"{_IMAGE}Represent the given image."
_PICTURE_AND_TEXT = f"{_IMAGE}Represent the given image with related text information."
_SELECT = f"{_IMAGE}Select the portion of the image that follows the language expressions."
_WHAT = "What does the picture show?"


@dataclass(frozen=True)
class _Plan:
    """What one task asks with.

    Attributes:
        pool: where its things come from.
        instruction, text: the two parts of a query; ``{}`` stands for the caption.
        target: instruction of candidates that are pictures.
        target_text: what is written beside candidate pictures.
        change: how the first picture of the queries is stored, the others are copies.
        folder: where pictures lie; tasks with one folder share files.
    """

    pool: str
    instruction: str
    text: str = ""
    target: str = ""
    target_text: str = ""
    change: Change | None = None
    folder: str = ""


# Instructions as the published rows have them where the tiny checkpoint understands them.
_PLANS: dict[str, _Plan] = {
    "ImageNet-1K": _Plan("scene_i2t", _CLASSIFY),
    "N24News": _Plan("scene_i2t", f"{_IMAGE}Represent the given news image with the following "
                     "caption for domain classification:", "A picture in the news", change="alpha"),
    "HatefulMemes": _Plan("scene_i2t", _CLASSIFY, folder="shared"),
    "VOC2007": _Plan("scene_i2t", f"{_IMAGE}Identify the object shown in the image."),
    "SUN397": _Plan("scene_i2t", f"{_IMAGE}Identify the scene shown in the image."),
    "Place365": _Plan("scene_i2t", f"{_IMAGE}Identify the scene shown in the image.",
                      change="palette"),
    "ImageNet-A": _Plan("digits_i2t", _CLASSIFY, change="frame"),
    "ImageNet-R": _Plan("digits_i2t", _CLASSIFY, change="grey"),
    "ObjectNet": _Plan("digits_i2t", f"{_IMAGE}Identify the handwritten number in the image."),
    "Country211": _Plan("digits_i2t", f"{_IMAGE}Identify the number depicted in the image.",
                        folder="Country211/Curaçao 1"),
    "OK-VQA": _Plan("scene_i2t", _ANSWER, _WHAT, folder="shared"),
    "A-OKVQA": _Plan("scene_i2t", _ANSWER, "Which of the captions is right?", folder="shared"),
    "DocVQA": _Plan("page_t2p", _ANSWER, "Which document is this?"),
    "InfographicsVQA": _Plan("chart_t2p", _ANSWER, "What does the graphic show?"),
    "ChartQA": _Plan("chart_t2p", _ANSWER, "What does the chart show?", change="large"),
    "Visual7W": _Plan("scene_i2t", _ANSWER, _WHAT),
    "ScienceQA": _Plan("digits_i2t", _ANSWER, "Which number is written here?"),
    "VizWiz": _Plan("scene_i2t", _ANSWER, _WHAT, change="jpeg"),
    "GQA": _Plan("scene_i2t", _ANSWER, "Where are the two?"),
    "TextVQA": _Plan("digits_i2t", _ANSWER, "What is written?"),
    "MSCOCO_i2t": _Plan("scene_i2t", _DESCRIBE, folder="MSCOCO"),
    "VisualNews_i2t": _Plan("scene_i2t", f"{_IMAGE}Find a caption for the news in the given "
                            "photo."),
    "VisDial": _Plan("scene_t2i", "Represent the given dialogue about an image, which is used for "
                     "image retrieval:", "Q:what is there? A:{}", _PICTURE),
    "MSCOCO_t2i": _Plan("scene_t2i", "Find me an image that matches the given caption.", "{}",
                        _PICTURE, folder="MSCOCO"),
    "VisualNews_t2i": _Plan("scene_t2i", "Retrieve an image of this news caption.", "{}", _PICTURE),
    "WebQA": _Plan("scene_t2i", "Find a Wikipedia image that answers this question:", "{}",
                   f"{_IMAGE}Represent the given Wikipedia image with related text information:",
                   "Figure"),
    "EDIS": _Plan("scene_t2i", "Find a news image that matches the provided caption:", "{}",
                  _PICTURE_AND_TEXT, "In the news today"),
    "Wiki-SS-NQ": _Plan("page_t2p", "Find the document image that can answer the given query:",
                        "{}", f"{_IMAGE}Represent the given document image."),
    "CIRR": _Plan("scene_i2i", f"{_IMAGE}Find me another image of the same scene:",
                  "the things a little further apart", _PICTURE),
    "NIGHTS": _Plan("scene_i2i", f"{_IMAGE}Find a day-to-day image that looks similar to the "
                    "provided image.", "", _PICTURE),
    "OVEN": _Plan("scene_i2i", f"{_IMAGE}Find me another image of the same scene:",
                  "what is this?", _PICTURE_AND_TEXT, "An article"),
    "FashionIQ": _Plan("digits_i2i", f"{_IMAGE}Find me another image of the same handwritten "
                       "number:", "in another hand", _PICTURE),
    "MSCOCO": _Plan("scene_t2i", _SELECT, "\"{}\"", f"{_IMAGE}Represent the given cropped image "
                    "of the object.", folder="MSCOCO"),
    "RefCOCO": _Plan("scene_t2i", _SELECT, "\"{}\"", f"{_IMAGE}Represent the given cropped image "
                     "of the object."),
    "RefCOCO-Matching": _Plan("scene_i2t", f"{_IMAGE}Select the portion of the image that follows "
                              "the language expressions:", "\"{}\"", _PICTURE_AND_TEXT),
    "Visual7W-Pointing": _Plan("scene_t2i", f"{_IMAGE}Select the portion of the image that answers "
                               "the question:", "Which one is {}?", f"{_IMAGE}Represent the given "
                               "cropped image of the object."),
}  # fmt: skip


def write_image_tasks(folder: DataFolder) -> None:
    """Tables and pictures of the image tasks of MMEB-v2."""
    for task in MMEB_V2:
        if task.modality == "image":
            rows = image_rows(folder, task.name, "image-tasks/MMEB")
            folder.table("image-tasks", task.name, "test", rows)


def image_rows(folder: DataFolder, name: str, media: str) -> list[dict[str, Any]]:
    """The rows of one image task; its pictures are written below ``media``.

    Columns: qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text, tgt_img_path. The lists of both
    target columns are equally long, and what is missing is an empty string.
    """
    plan = _PLANS[name]
    if name == "RefCOCO-Matching":
        return _matching_rows(folder, name, plan, media)
    if plan.target:
        return _picture_rows(folder, name, plan, media)
    return _text_rows(folder, name, plan, media)


def _text_rows(folder: DataFolder, name: str, plan: _Plan, media: str) -> list[dict[str, Any]]:
    """A picture, perhaps with a question; texts are ranked."""
    rng = folder.rng(name)
    asked, ranked = pools()[plan.pool].draw(rng, _QUERIES, _CANDIDATES, caption_of)
    classes = "CLS" in next(task.group for task in MMEB_V2 if task.name == name)
    rows = []
    for number, thing in enumerate(asked):
        path = _picture(folder, media, plan, name, thing, number)
        others = [other.caption for other in ranked if other != thing]
        if not classes:  # questions have lists of their own, of different lengths
            others = rng.sample(others, rng.randint(5, len(others)))
        texts = [thing.caption, *others]
        rows.append(_row(plan, thing, path, texts, [""] * len(texts)))
    return rows


def _picture_rows(folder: DataFolder, name: str, plan: _Plan, media: str) -> list[dict[str, Any]]:
    """A text, a picture or both; pictures are ranked."""
    rng = folder.rng(name)
    pool = pools()[plan.pool]
    pairs = bool(pool.whole[0].again)  # the query shows the thing, the answer shows it again
    crops = not pairs and plan.instruction.startswith(_IMAGE)
    has = again_of if pairs else shown_of
    asked, ranked = pool.draw(rng, _QUERIES, _CANDIDATES, has)
    places = {}
    for thing in ranked:
        places[thing.id] = f"{plan.folder or name}/{thing.id}-{'crop' if crops else 'target'}.png"
        picture = has(thing)[0]
        folder.picture(f"{media}/{places[thing.id]}", picture, "crop" if crops else None)
    rows = []
    for number, thing in enumerate(asked):
        with_picture = pairs or crops
        path = _picture(folder, media, plan, name, thing, number) if with_picture else ""
        others = [other.id for other in ranked if other != thing]
        paths = [places[id] for id in (thing.id, *rng.sample(others, rng.randint(6, len(others))))]
        rows.append(_row(plan, thing, path, [plan.target_text] * len(paths), paths))
    return rows


def _matching_rows(folder: DataFolder, name: str, plan: _Plan, media: str) -> list[dict[str, Any]]:
    """Pictures with texts on both sides; one picture stands there with different texts."""
    rng = folder.rng(name)
    asked, _ = pools()[plan.pool].draw(rng, _QUERIES, _QUERIES, caption_of)
    paths = [_picture(folder, media, plan, name, thing, n) for n, thing in enumerate(asked)]
    rows = []
    for number, thing in enumerate(asked):
        wrong = asked[number - 1]
        texts = [thing.caption, wrong.caption, *(t.caption for t in asked if t != thing)]
        shown = [paths[number], paths[number], *(p for p in paths if p != paths[number])]
        rows.append(_row(plan, thing, paths[number], [f'"{text}"' for text in texts], shown))
    return rows


def _row(
    plan: _Plan, thing: Thing, picture: str, texts: list[str], pictures: list[str]
) -> dict[str, Any]:
    return {
        "qry_inst": plan.instruction,
        "qry_text": plan.text.format(thing.caption),
        "qry_img_path": picture,
        "tgt_inst": plan.target,
        "tgt_text": texts,
        "tgt_img_path": pictures,
    }


def _picture(
    folder: DataFolder, media: str, plan: _Plan, name: str, thing: Thing, number: int
) -> str:
    """Write the picture of a query; its path as it stands in the rows."""
    change = plan.change if number == 0 else None
    path = f"{plan.folder or name}/{thing.id}{'-' + change if change else ''}.png"
    folder.picture(f"{media}/{path}", thing.shown[0], change)
    return path
