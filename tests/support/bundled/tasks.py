"""The retrieval tasks the bundled checkpoint learns: what is asked, what is found, in which words.

The instructions are written the way the MMEB-v2 tasks write theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_TARGET = "Represent the given image."
VIDEO_TARGET = "Understand the content of the provided video."
PAGE_QUERY = "Find a document image that matches the given query:"
PAGE_TARGET = "Understand the content of the provided document image."


@dataclass(frozen=True)
class Task:
    """One direction of retrieval over one family of pictures.

    Attributes:
        name: identifies the task.
        kind: what is on the two sides, as in ``"text→image"``.
        family: key of ``families.FAMILIES``.
        query_visual, target_visual: whether that side is the picture (else its caption).
        query_instruction, target_instruction: text in front of that side's caption, or alone.
    """

    name: str
    kind: str
    family: str
    query_visual: bool
    target_visual: bool
    query_instruction: str
    target_instruction: str


TASKS: tuple[Task, ...] = (
    Task(
        "scene_t2i", "text→image", "scene", False, True,
        "Find me an image that matches the given caption.", IMAGE_TARGET,
    ),
    Task(
        "scene_i2t", "image→text", "scene", True, False,
        "Find an image caption describing the given image.", "",
    ),
    Task(
        "scene_i2i", "image→image", "scene", True, True,
        "Find me another image of the same scene.", IMAGE_TARGET,
    ),
    Task(
        "digits_i2t", "image→text", "digits", True, False,
        "Identify the handwritten number in the image.", "",
    ),
    Task(
        "digits_i2i", "image→image", "digits", True, True,
        "Find me another image of the same handwritten number.", IMAGE_TARGET,
    ),
    Task(
        "clip_t2v", "text→video", "clip", False, True,
        "Find a video that includes the following described scene:", VIDEO_TARGET,
    ),
    Task(
        "clip_v2t", "video→text", "clip", True, False,
        "Find a caption describing the given video.", "",
    ),
    Task("chart_t2p", "text→page", "chart", False, True, PAGE_QUERY, PAGE_TARGET),
    Task("page_t2p", "text→page", "page", False, True, PAGE_QUERY, PAGE_TARGET),
)  # fmt: skip
