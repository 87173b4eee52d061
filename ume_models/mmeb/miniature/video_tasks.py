"""Video classification, video retrieval and moment retrieval."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.material import Thing, caption_of, pools, shown_of

_QUERIES = 8
_FRAMES = "video-tasks/frames"


def write_video_tasks(folder: DataFolder) -> None:
    """Tables and frames of the video tasks of MMEB-v2 without a question."""
    _choices(folder)
    for name, table in (
        ("HMDB51", "HMDB51"), ("UCF101", "UCF101"), ("K700", "Kinetics-700"),
        ("Breakfast", "Breakfast"),
    ):  # fmt: skip
        _classes(folder, name, table)
    _retrieval(folder)
    _moments(folder, "QVHighlight")
    _moments(folder, "Charades-STA")
    _momentseeker(folder)


def _choices(folder: DataFolder) -> None:
    """SmthSmthV2: every row brings its own choices, the right one among them."""
    rng = folder.rng("SmthSmthV2")
    asked, ranked = pools()["clip_v2t"].draw(rng, _QUERIES, 10, caption_of)
    rows = []
    for number, thing in enumerate(asked):
        wrong = [other.caption for other in ranked if other != thing]
        choices = [thing.caption, *rng.sample(wrong, 4 + number % 3)]
        rng.shuffle(choices)
        video = 20000 + number
        folder.frames(f"{_FRAMES}/video_cls/SSv2/{video}", thing.shown)
        rows.append({"video_id": video, "pos_text": thing.caption, "neg_text": choices})
    folder.table("video-tasks/SmthSmthV2", None, "test", rows)


def _classes(folder: DataFolder, name: str, table: str) -> None:
    """Two videos of three classes each; the classes of the published list are ranked as well."""
    rng = folder.rng(name)
    asked, _ = pools()["clip_v2t"].draw(rng, _QUERIES - 2, _QUERIES - 2, caption_of)
    rows = []
    for number, thing in enumerate([*asked, *asked[:2]]):
        video = f"v_{name}_g{number:02d}"
        # Every third has more frames than are looked at.
        each = 3 if number % 3 == 2 else 1
        folder.frames(f"{_FRAMES}/video_cls/{name}/{video}", thing.shown, each=each)
        rows.append({"video_id": video, "pos_text": thing.caption})
    folder.text(f"{_FRAMES}/video_cls/{name}/{rows[0]['video_id']}/source.txt", "not a frame\n")
    folder.table(f"video-tasks/{table}", None, "test", rows)


def _retrieval(folder: DataFolder) -> None:
    """Captions that ask for one of the videos that the rows name."""

    def rows_of(
        name: str, row: Callable[[int, Thing], tuple[str, dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        asked, _ = pools()["clip_t2v"].draw(folder.rng(name), 10, 10, shown_of)
        rows = []
        for number, thing in enumerate(asked):
            video, content = row(number, thing)
            each = 3 if number == 1 else 1
            folder.frames(f"{_FRAMES}/video_ret/{name}/{_subfolder(name)}{video}", thing.shown,
                          each=each)  # fmt: skip
            rows.append(content)
        return rows

    rows = rows_of(
        "MSR-VTT",
        lambda n, thing: (
            f"video{7010 + n}",
            {
                "video_id": f"video{7010 + n}",
                "video": f"video{7010 + n}.mp4",
                "caption": thing.caption,
                "source": "miniature",
            },
        ),
    )
    folder.described_json("video-tasks/MSR-VTT", "test_1k", "test", "msrvtt_test_1k.json", rows)

    rows = rows_of(
        "MSVD",
        lambda n, thing: (
            f"-4wsuPCjDBc_{n}_{n + 7}",
            {
                "video_id": f"-4wsuPCjDBc_{n}_{n + 7}",
                "video": f"-4wsuPCjDBc_{n}_{n + 7}.avi",
                "caption": [thing.caption, "something else is described here"],
            },
        ),
    )
    folder.table("video-tasks/MSVD", None, "test", rows)

    rows = rows_of(
        "DiDeMo",
        lambda n, thing: (
            f"{n}@N01_{n}",
            {"video": f"test/{n}@N01_{n}.mp4", "caption": thing.caption},
        ),
    )
    rows.append({**rows[0], "caption": f"{rows[0]['caption']}."})  # one video, asked for twice
    folder.table("video-tasks/DiDeMo", None, "test", rows)

    rows = rows_of(
        "YouCook2",
        lambda n, thing: (
            f"xHr8X2Wpmno_{n}",
            {
                "id": f"xHr8X2Wpmno_{n}",
                "video_path": f"validation/101/xHr8X2Wpmno_{n}.mp4",
                "sentence": thing.caption,
            },
        ),
    )
    folder.table("video-tasks/YouCook2", None, "val", rows)

    rows = rows_of(
        "VATEX",
        lambda n, thing: (
            f"Ptf_2VRj-V0_{n:06d}",
            {
                "videoID": f"Ptf_2VRj-V0_{n:06d}",
                "enCap": [thing.caption, "something else is described here"],
            },
        ),
    )
    folder.table("video-tasks/VATEX", None, "test", rows)


def _subfolder(name: str) -> str:
    """Both of the places where the frames of video retrieval are found."""
    return "frames/" if name in ("MSR-VTT", "MSVD", "DiDeMo") else ""


def _clips(rng: Random, number: int) -> list[tuple[Thing, list[Thing], Thing]]:
    """Per query: the clip asked for, the wrong ones, and one more for the rest of the video."""
    pool = pools()["clip_t2v"]
    drawn = []
    for thing in rng.sample(pool.whole, number):
        others = [other for other in (*pool.whole, *pool.partial) if other != thing]
        *wrong, rest = rng.sample(others, rng.randint(6, 8))
        drawn.append((thing, wrong, rest))
    return drawn


def _moments(folder: DataFolder, name: str) -> None:
    """A folder per video: ``query`` with its frames, and one folder per clip."""
    rng = folder.rng(name)
    rows = []
    for number, (thing, wrong, rest) in enumerate(_clips(rng, _QUERIES)):
        video = f"{name[:2]}{number:02d}_60.0_210.0"
        place = f"{_FRAMES}/video_mret/{name}/{video}"
        folder.frames(f"{place}/query", [*thing.shown, *rest.shown])
        folder.frames(f"{place}/positive_{number % 3}", thing.shown)
        for position, other in enumerate(wrong):
            folder.frames(f"{place}/negative_{position}", other.shown)
        folder.text(f"{place}/clips.json", "{}\n")
        rows.append({"query": thing.caption, "video_path": f"videos/{video}.mp4"})
    if name == "Charades-STA":  # where the evaluation of PLUME has it
        folder.jsonl("video-tasks/data/charades_sta.jsonl", rows)
    else:
        folder.table(f"video-tasks/{name}", None, "test", rows)


def _momentseeker(folder: DataFolder) -> None:
    """Queries that are a text, a text with a picture, or a text with a video."""
    rng = folder.rng("MomentSeeker")
    place = f"{_FRAMES}/video_mret/MomentSeeker"
    rows = []
    for number, (thing, wrong, _) in enumerate(_clips(rng, _QUERIES + 1)):
        given = ("", f"images/{number}.jpg", f"movie101/{number}.mp4")[number % 3]
        if number % 3 == 1:
            folder.picture(f"{place}/query_{given}", thing.shown[0], "jpeg")
        elif number % 3 == 2:
            folder.frames(f"{place}/video_frames/movie101_{number}", thing.shown)
        entries = []
        for position, clip in enumerate([thing, *wrong]):
            folder.frames(f"{place}/video_frames/clips_{number}_{position}", clip.shown)
            # Some publications name a single frame as well.
            frame = f"videos/middle/{number}_{position}.png" if number < 3 else ""
            if frame:
                folder.picture(f"{place}/{frame.removeprefix('videos/')}", clip.shown[2])
            entries.append({"output_path": f"clips/{number}/{position}.mp4", "frame_path": frame})
        rows.append(
            {
                "query": thing.caption,
                "input_frames": given,
                "positive_frames": entries[:1],
                "negative_frames": entries[1:],
            }
        )
    folder.table("video-tasks/MomentSeeker", None, "test", rows)
