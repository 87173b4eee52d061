"""The 78 tasks of MMEB-v2 (arXiv 2507.04590), in the order of its configuration files.

Sources: VLM2Vec ``experiments/public/eval/{image,video,visdoc}.yaml`` and
``src/constant/dataset_hf_path.py`` (fixed page labels since #167); the copy bundled with PLUME for
its instructions and the labels published first.
"""

from __future__ import annotations

from dataclasses import replace

from ume_models.mmeb.tasks import HIT, NDCG, Instructions, Ranking, Source, Task

_QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
_VISRAG = "openbmb/VisRAG-Ret-Test-"
_VIDEO = "Understand the content of the provided video."
_PAGE = Instructions(
    "Find a document image that matches the given query:",
    "Understand the content of the provided document image.",
)


def _image(name: str, group: str, reader: str) -> Task:
    """Rows bring their instructions; every query has its own list of candidates."""
    source = Source("ziyjiang/MMEB_Test_Instruct", name, "test", ("image-tasks",))
    media = ("image-tasks/MMEB", "image-tasks")
    return Task(name, "MMEB-v2", "image", group, reader, "local", HIT, source, media)


def _video(
    name: str,
    group: str,
    reader: str,
    ranking: Ranking,
    query: str,
    target: str,
    frames: str | tuple[str, ...],
    repository: str,
    config: str | None = None,
    split: str = "test",
    *,
    other: tuple[str, ...] = (),
    limit: int | None = None,
) -> Task:
    folder = repository.rsplit("/", 1)[-1]
    source = Source(repository, config, split, (f"video-tasks/{folder}", *other))
    folders = (frames,) if isinstance(frames, str) else frames
    media = tuple(f"video-tasks/frames/{frame}" for frame in folders)
    words = Instructions(query, target)
    return Task(
        name, "MMEB-v2", "video", group, reader, ranking, HIT, source, media, words, limit=limit
    )


def _page(
    name: str,
    group: str,
    reader: str,
    repository: str,
    folder: str | None = None,
    *,
    split: str = "test",
    legacy: str | None = None,
) -> Task:
    """Graded relevance over one collection of pages; PLUME's ViDoRe reader has no instructions."""

    def source(repository: str) -> Source:
        return Source(repository, None, split, (f"visdoc-tasks/{repository.rsplit('/', 1)[-1]}",))

    media = tuple(
        f"{root}/{folder or name}" for root in ("visdoc-tasks", "visdoc-tasks/visdoc-tasks")
    )
    return Task(
        name, "MMEB-v2", "visdoc", group, reader, "global", NDCG, source(repository), media, _PAGE,
        plume_instructions=Instructions() if reader == "vidore" else None,
        legacy_source=None if legacy is None else source(legacy),
    )  # fmt: skip


# fmt: off
MMEB_V2: tuple[Task, ...] = (
    # image classification
    _image("ImageNet-1K",       "I-CLS", "image_cls"),
    _image("N24News",           "I-CLS", "image_cls"),
    _image("HatefulMemes",      "I-CLS", "image_cls"),
    _image("VOC2007",           "I-CLS", "image_cls"),
    _image("SUN397",            "I-CLS", "image_cls"),
    _image("Place365",          "I-CLS", "image_cls"),
    _image("ImageNet-A",        "I-CLS", "image_cls"),
    _image("ImageNet-R",        "I-CLS", "image_cls"),
    _image("ObjectNet",         "I-CLS", "image_cls"),
    _image("Country211",        "I-CLS", "image_cls"),
    # visual question answering
    _image("OK-VQA",            "I-QA",  "image_qa"),
    _image("A-OKVQA",           "I-QA",  "image_qa"),
    _image("DocVQA",            "I-QA",  "image_qa"),
    _image("InfographicsVQA",   "I-QA",  "image_qa"),
    _image("ChartQA",           "I-QA",  "image_qa"),
    _image("Visual7W",          "I-QA",  "image_qa"),
    _image("ScienceQA",         "I-QA",  "image_qa"),
    _image("VizWiz",            "I-QA",  "image_qa"),
    _image("GQA",               "I-QA",  "image_qa"),
    _image("TextVQA",           "I-QA",  "image_qa"),
    # retrieval: image to text, text to image, image (and text) to image
    _image("MSCOCO_i2t",        "I-RET", "image_i2t"),
    _image("VisualNews_i2t",    "I-RET", "image_i2t"),
    _image("VisDial",           "I-RET", "image_t2i"),
    _image("MSCOCO_t2i",        "I-RET", "image_t2i"),
    _image("VisualNews_t2i",    "I-RET", "image_t2i"),
    _image("WebQA",             "I-RET", "image_t2i"),
    _image("EDIS",              "I-RET", "image_t2i"),
    _image("Wiki-SS-NQ",        "I-RET", "image_t2i"),
    _image("CIRR",              "I-RET", "image_i2i"),
    _image("NIGHTS",            "I-RET", "image_i2i"),
    _image("OVEN",              "I-RET", "image_i2i"),
    _image("FashionIQ",         "I-RET", "image_i2i"),
    # visual grounding
    _image("MSCOCO",            "I-VG",  "image_i2i"),
    _image("RefCOCO",           "I-VG",  "image_i2i"),
    _image("RefCOCO-Matching",  "I-VG",  "image_i2i"),
    _image("Visual7W-Pointing", "I-VG",  "image_i2i"),
    # video classification
    _video("SmthSmthV2", "V-CLS", "video_choice", "local",
           "What actions or object interactions are being performed by the person in the video?",
           "", "video_cls/SSv2", "VLM2Vec/SmthSmthV2", limit=1000),
    _video("HMDB51", "V-CLS", "video_cls", "global",
           "What actions or objects interactions are the person in the video doing?", "",
           "video_cls/HMDB51", "VLM2Vec/HMDB51"),
    _video("UCF101", "V-CLS", "video_cls", "global",
           "What activities or sports are being performed by the person in the video?", "",
           "video_cls/UCF101", "VLM2Vec/UCF101"),
    _video("K700", "V-CLS", "video_cls", "global",
           "Recognize the category of the video content.", "",
           "video_cls/K700", "VLM2Vec/Kinetics-700"),
    _video("Breakfast", "V-CLS", "video_cls", "global",
           "Recognize the breakfast type that the person is cooking in the video. ", "",
           "video_cls/Breakfast", "VLM2Vec/Breakfast"),
    # video retrieval
    _video("MSR-VTT", "V-RET", "msrvtt", "global",
           "Find a video that contains the following visual content:", _VIDEO,
           ("video_ret/MSR-VTT/frames", "video_ret/MSR-VTT"), "VLM2Vec/MSR-VTT", "test_1k"),
    _video("MSVD", "V-RET", "msvd", "global",
           "Find the video snippet that corresponds to the given summary:", _VIDEO,
           ("video_ret/MSVD/frames", "video_ret/MSVD"), "VLM2Vec/MSVD"),
    _video("DiDeMo", "V-RET", "didemo", "global",
           "Find a video that includes the following described scenes:", _VIDEO,
           ("video_ret/DiDeMo/frames", "video_ret/DiDeMo"), "VLM2Vec/DiDeMo"),
    _video("YouCook2", "V-RET", "youcook2", "global",
           "Find a video that demonstrates the following action while making a recipe:", _VIDEO,
           ("video_ret/YouCook2/frames", "video_ret/YouCook2"), "lmms-lab/YouCook2", None, "val"),
    _video("VATEX", "V-RET", "vatex", "global",
           "Select a video that fits the description provided:", _VIDEO,
           ("video_ret/VATEX/frames", "video_ret/VATEX"), "VLM2Vec/VATEX"),
    # moment retrieval
    _video("QVHighlight", "V-MRET", "moments", "local",
           "Find the clip that corresponds to the described scene in the given video:", _VIDEO,
           "video_mret/QVHighlight", "VLM2Vec/QVHighlight"),
    _video("Charades-STA", "V-MRET", "moments", "local",
           "Find the clip that corresponds to the described scene in the given video:", _VIDEO,
           ("video_mret/Charades-STA", "video_mret/Charades_STA"), "VLM2Vec/Charades-STA",
           other=("video-tasks/data/charades_sta.jsonl",)),
    _video("MomentSeeker", "V-MRET", "momentseeker", "local",
           "Find the clip that corresponds to the given text:",
           "Understand the content of the provided video clip.",
           "video_mret/MomentSeeker", "VLM2Vec/MomentSeeker",
           other=("video-tasks/data/momentseeker.jsonl",)),
    # video question answering
    _video("Video-MME", "V-QA", "videomme", "local", _QUESTION, "",
           "video_qa/Video-MME", "VLM2Vec/Video-MME"),
    _video("NExTQA", "V-QA", "nextqa", "local", _QUESTION, "",
           "video_qa/NExTQA", "VLM2Vec/NExTQA", "MC"),
    _video("EgoSchema", "V-QA", "egoschema", "local", _QUESTION, "",
           "video_qa/EgoSchema", "VLM2Vec/EgoSchema", "Subset"),
    _video("MVBench", "V-QA", "mvbench", "local", _QUESTION, "",
           "video_qa/MVBench", "VLM2Vec/MVBench", None, "train"),
    _video("ActivityNetQA", "V-QA", "activitynetqa", "local", _QUESTION, "",
           "video_qa/ActivityNetQA", "VLM2Vec/ActivityNetQA",
           other=("video-tasks/data/activitynetqa.jsonl",)),
    # visual documents: ViDoRe, first version
    _page("ViDoRe_arxivqa",     "ViDoRe-v1", "vidore", "vidore/arxivqa_test_subsampled_beir"),
    _page("ViDoRe_docvqa",      "ViDoRe-v1", "vidore", "vidore/docvqa_test_subsampled_beir"),
    _page("ViDoRe_infovqa",     "ViDoRe-v1", "vidore", "vidore/infovqa_test_subsampled_beir"),
    _page("ViDoRe_tabfquad",    "ViDoRe-v1", "vidore", "vidore/tabfquad_test_subsampled_beir"),
    _page("ViDoRe_tatdqa",      "ViDoRe-v1", "vidore", "vidore/tatdqa_test_beir"),
    _page("ViDoRe_shiftproject", "ViDoRe-v1", "vidore", "vidore/shiftproject_test_beir"),
    _page("ViDoRe_syntheticDocQA_artificial_intelligence", "ViDoRe-v1", "vidore",
          "vidore/syntheticDocQA_artificial_intelligence_test_beir"),
    _page("ViDoRe_syntheticDocQA_energy", "ViDoRe-v1", "vidore",
          "vidore/syntheticDocQA_energy_test_beir"),
    _page("ViDoRe_syntheticDocQA_government_reports", "ViDoRe-v1", "vidore",
          "vidore/syntheticDocQA_government_reports_test_beir"),
    _page("ViDoRe_syntheticDocQA_healthcare_industry", "ViDoRe-v1", "vidore",
          "vidore/syntheticDocQA_healthcare_industry_test_beir"),
    # ViDoRe, second version
    _page("ViDoRe_esg_reports_human_labeled_v2", "ViDoRe-v2", "vidore",
          "vidore/esg_reports_human_labeled_v2", "esg_reports_human_labeled_v2"),
    _page("ViDoRe_biomedical_lectures_v2_multilingual", "ViDoRe-v2", "vidore",
          "vidore/biomedical_lectures_v2", "biomedical_lectures_v2_multilingual"),
    _page("ViDoRe_economics_reports_v2_multilingual", "ViDoRe-v2", "vidore",
          "vidore/economics_reports_v2", "economics_reports_v2_multilingual"),
    _page("ViDoRe_esg_reports_v2_multilingual", "ViDoRe-v2", "vidore",
          "vidore/esg_reports_v2", "esg_reports_v2_multilingual"),
    # VisRAG
    _page("VisRAG_ArxivQA",   "VisRAG", "visrag", _VISRAG + "ArxivQA", split="train"),
    _page("VisRAG_ChartQA",   "VisRAG", "visrag", _VISRAG + "ChartQA", split="train"),
    _page("VisRAG_MP-DocVQA", "VisRAG", "visrag", _VISRAG + "MP-DocVQA", split="train"),
    _page("VisRAG_SlideVQA",  "VisRAG", "visrag", _VISRAG + "SlideVQA", split="train"),
    _page("VisRAG_InfoVQA",   "VisRAG", "visrag", _VISRAG + "InfoVQA", split="train"),
    _page("VisRAG_PlotQA",    "VisRAG", "visrag", _VISRAG + "PlotQA",    split="train"),
    # out of distribution: pages and whole documents
    _page("ViDoSeek-page", "VisDoc-OOD", "vidore", "VLM2Vec/ViDoSeek-page-fixed",
          legacy="VLM2Vec/ViDoSeek-page"),
    _page("ViDoSeek-doc",  "VisDoc-OOD", "vidore", "VLM2Vec/ViDoSeek"),
    _page("MMLongBench-doc", "VisDoc-OOD", "vidore", "VLM2Vec/MMLongBench-doc"),
    _page("MMLongBench-page", "VisDoc-OOD", "vidore", "VLM2Vec/MMLongBench-page-fixed",
          legacy="VLM2Vec/MMLongBench"),
)
# fmt: on


def _on_the_leaderboard(task: Task) -> Task:
    """A task in the version that the leaderboard scores since 2026, under its name there."""
    task = replace(task, benchmark="MMEB-v2-2026")
    if task.name == "MomentSeeker":  # first published with 1,800 rows, 198 of them repeated
        paths = ("video-tasks/MomentSeeker", "video-tasks/data/momentseeker_1k6.jsonl")
        return replace(task, source=replace(task.source, paths=paths), most=1602)
    if task.legacy_source is None:
        return task
    name = f"{task.name}-fixed"
    return replace(
        task, name=name, media=(*task.media, f"visdoc-tasks/images/{name}"), legacy_source=None
    )


MMEB_V2_2026: tuple[Task, ...] = tuple(map(_on_the_leaderboard, MMEB_V2))
"""The corrected sets, one version of each; VLM2Vec ``docs/mmebv2_reproduction`` (#213)."""
