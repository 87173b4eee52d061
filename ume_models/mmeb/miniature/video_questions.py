"""Questions about videos with a few answers to choose from."""

from __future__ import annotations

from random import Random

from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.material import Thing, caption_of, pools

_QUERIES = 8
_FRAMES = "video-tasks/frames/video_qa"
_QUESTION = "What happens in the video?"

# The parts of MVBench, in the order of the official evaluation.
MVBENCH = (
    "episodic_reasoning", "action_sequence", "action_prediction", "action_antonym",
    "fine_grained_action", "unexpected_action", "object_existence", "object_interaction",
    "object_shuffle", "moving_direction", "action_localization", "scene_transition",
    "action_count", "moving_count", "moving_attribute", "state_change", "fine_grained_pose",
    "character_order", "egocentric_navigation", "counterfactual_inference",
)  # fmt: skip


def write_video_questions(folder: DataFolder) -> None:
    """Tables and frames of the video question tasks of MMEB-v2."""
    _videomme(folder)
    _nextqa(folder)
    _egoschema(folder)
    _mvbench(folder)
    _activitynetqa(folder)


def _drawn(rng: Random, options: int, queries: int = _QUERIES) -> list[tuple[Thing, list[str]]]:
    """Things to ask about with their choices, the right one at a random place."""
    pool = pools()["clip_v2t"]
    drawn = []
    for thing in rng.sample(pool.whole, min(queries, len(pool.whole))):
        others = [other for other in (*pool.whole, *pool.partial) if other != thing]
        choices = [thing.caption, *(other.caption for other in rng.sample(others, options - 1))]
        rng.shuffle(choices)
        drawn.append((thing, choices))
    return drawn


def _lettered(choices: list[str]) -> list[str]:
    return [f"{letter}. {choice}." for letter, choice in zip("ABCDE", choices, strict=False)]


def _videomme(folder: DataFolder) -> None:
    rows = []
    for number, (thing, choices) in enumerate(_drawn(folder.rng("Video-MME"), 4)):
        video = f"fFjv93ACGo{number}"
        folder.frames(f"{_FRAMES}/Video-MME/{video}", thing.shown, each=1 + 2 * (number % 2))
        rows.append(
            {
                "video_id": f"{number + 1:03d}",
                "domain": "Knowledge",
                "sub_category": "Geometry",
                "videoID": video,
                "question_id": f"{number + 1:03d}-1",
                "question": _QUESTION,
                "options": _lettered(choices),
                "answer": "ABCD"[choices.index(thing.caption)],
            }
        )
    folder.table("video-tasks/Video-MME", None, "test", rows)


def _nextqa(folder: DataFolder) -> None:
    rows = []
    for number, (thing, choices) in enumerate(_drawn(folder.rng("NExTQA"), 5)):
        video = 4740931970 + number  # a number in the published tables
        folder.frames(f"{_FRAMES}/NExTQA/{video}", thing.shown)
        rows.append(
            {
                "video": video,
                "question": _QUESTION.rstrip("?").lower(),
                "answer": choices.index(thing.caption),
                "qid": number,
                "type": "DO",
                **{f"a{position}": choice for position, choice in enumerate(choices)},
            }
        )
    folder.table("video-tasks/NExTQA", "MC", "test", rows)


def _egoschema(folder: DataFolder) -> None:
    rows = []
    for number, (thing, choices) in enumerate(_drawn(folder.rng("EgoSchema"), 5)):
        video = f"0074f737-11cb-497d-8d07-77c3a8127{number:03d}"
        folder.frames(f"{_FRAMES}/EgoSchema/{video}", thing.shown)
        rows.append(
            {
                "question_idx": str(number),
                "question": _QUESTION,
                "video_idx": video,
                "option": _lettered(choices),
                "answer": str(choices.index(thing.caption)),
            }
        )
    folder.table("video-tasks/EgoSchema", "Subset", "test", rows)


def _mvbench(folder: DataFolder) -> None:
    """One question per part; there are fewer clips than parts."""
    rng = folder.rng("MVBench")
    drawn = _drawn(rng, 4, len(MVBENCH))
    drawn += _drawn(rng, 3, len(MVBENCH) - len(drawn))
    for part, (thing, choices) in zip(MVBENCH, drawn, strict=True):
        # One of the sources has folders of frames instead of videos.
        video = f"{part}_0" if part == "episodic_reasoning" else f"{part}_0.mp4"
        folder.frames(f"{_FRAMES}/MVBench/{part}/{video}", thing.shown)
        row = {
            "video": video,
            "question": _QUESTION,
            "candidates": choices,
            "answer": thing.caption,
        }
        folder.table("video-tasks/MVBench", part, "train", [row])


def _activitynetqa(folder: DataFolder) -> None:
    """Yes or no; in the file that the evaluation of PLUME reads."""
    rng = folder.rng("ActivityNetQA")
    asked, _ = pools()["clip_v2t"].draw(rng, _QUERIES, _QUERIES, caption_of)
    rows = []
    for number, thing in enumerate(asked):
        right = number % 2 == 0
        named = thing if right else asked[number - 1]
        folder.frames(f"{_FRAMES}/ActivityNetQA/v_{number:04d}", thing.shown)
        rows.append(
            {
                "video_name": f"{number:04d}",
                "question": f"is it {named.caption}",
                "question_id": f"v_{number:04d}_0",
                "answer": "yes" if right else "no",
                "type": "3",
            }
        )
    folder.jsonl("video-tasks/data/activitynetqa.jsonl", rows)
