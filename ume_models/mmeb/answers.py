"""Whether the queries of a task can be scored: their ids, answers and lists of candidates.

An answer that is not among the candidates cannot be found, so its query would score zero and no one
would know why.
"""

from __future__ import annotations

from ume_models.mmeb.dataset import TaskData

_NAMED = 3

NO_QUERIES = ("there are no queries", "download the tables again")
# What may be wrong ({n} queries of {of}), and what to do.
KINDS: dict[str, tuple[str, str]] = {
    "repeated id": (
        "{n} of {of} queries have an id that another one has",
        "download the tables again",
    ),
    "no answer": (
        "{n} of {of} queries have no answer",
        "download the tables again",
    ),
    "no list": (
        "{n} of {of} queries have no candidates to be ranked among",
        "download the tables again",
    ),
    "unknown label": (
        "the answers of {n} of {of} queries are not among their candidates",
        "get the version of the tables that belongs to these labels, or try the other labels",
    ),
    "unpaired grades": (
        "{n} of {of} queries have not as many grades as answers",
        "download the tables again",
    ),
}  # fmt: skip


def wrong_answers(data: TaskData) -> dict[str, dict[str, str]]:
    """By kind of ``KINDS`` the ids of the queries it is true of, each with a reason or ""."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    names = frozenset(data.candidates.names)
    local = data.task.ranking == "local"
    ids: set[str] = set()
    for query in data.queries:
        id = str(query.item.id)
        if id in ids:
            found["repeated id"][id] = ""
        ids.add(id)
        if not query.relevant:
            found["no answer"][id] = ""
        # What a query lists counts only where it is a candidate of the task.
        ranked = names.intersection(query.candidates) if local else names
        lacking = [repr(label) for label in query.relevant if label not in ranked]
        if not (query.candidates if local else names):
            found["no list"][id] = ""
        elif lacking:
            found["unknown label"][id] = lacking[0]
        if query.grades is not None and len(query.grades) != len(query.relevant):
            found["unpaired grades"][id] = ""
    return found


def problems_of_answers(data: TaskData) -> list[str]:
    """What would make the scores of a task wrong, a sentence each; empty if all is well.

    Every answer must be among the candidates that its query is ranked among: its own list (local
    ranking), or the collection. Ids must be unique, and no query without answers or candidates.
    Media are not looked at. Takes about a second per million of listed candidates.
    """
    if not data.queries:
        return ["; ".join(NO_QUERIES)]
    problems = []
    for kind, ids in wrong_answers(data).items():
        if ids:
            what, remedy = KINDS[kind]
            text = what.format(n=len(ids), of=len(data.queries))
            problems.append(f"{text}: {first_of(ids)}; {remedy}")
    return problems


def first_of(names: dict[str, str]) -> str:
    """The first names, with reasons, and how many more there are."""
    shown = [f"{name} ({reason})" if reason else name for name, reason in names.items()][:_NAMED]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown) + more
