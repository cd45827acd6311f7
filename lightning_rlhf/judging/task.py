"""Judging tasks as data: the questions to a judge, in YAML files, ours or a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml


Style = Literal["base", "detailed"]
"""Instructions to a judge: the task alone (``base``), or with guidelines as for human raters (``detailed``)."""


@dataclass(frozen=True)
class Exemplar:
    """A judged example for the prompt.

    Args:
        context: text of the context.
        first: the first candidate.
        second: the second candidate.
        label: the label that a judge should give, one of the task's.
        rationale: why; shown when a chain of thought is asked for.
    """

    context: str
    first: str
    second: str
    label: str
    rationale: str = ""


@dataclass(frozen=True)
class PairTask:
    """The question which of two candidates is better, or worse.

    Args:
        preambles: instructions by style, without the sentence about the output.
        verdict: closing sentence of the instructions when the label is asked for at once.
        reasons: closing sentence of the instructions when a rationale is asked for first.
        thinking: text before the rationale: a request, and behind an empty line how the rationale begins.
        ending: text whose natural continuation is the label.
        prefers: ``better`` if the label names the better candidate, ``worse`` if it names the worse one.
        labels: the possible answers for the first and for the second candidate.
        exemplars: judged examples, of which a prompt shows the first k.
    """

    preambles: dict[str, str]
    verdict: str
    reasons: str
    thinking: str
    ending: str
    prefers: Literal["better", "worse"] = "better"
    labels: tuple[str, ...] = ("1", "2")
    exemplars: tuple[Exemplar, ...] = ()


@dataclass(frozen=True)
class RatingTask:
    """The question how good one candidate is.

    Args:
        preambles: instructions by style.
        ending: text whose natural continuation is the label.
        labels: the possible answers.
        values: value of each label, higher is better.
    """

    preambles: dict[str, str]
    ending: str
    labels: tuple[str, ...] = tuple(map(str, range(1, 11)))
    values: tuple[float, ...] = tuple(map(float, range(1, 11)))


@dataclass(frozen=True)
class Task:
    """A judging task: the questions about candidates.

    Args:
        name: name of the task.
        context: name of the context in prompts, e.g. "Text".
        candidate: name of a candidate in prompts, e.g. "Summary".
        dialogue: whether the context is a conversation; a long one loses its beginning, another text its end.
        pair: the question about two candidates.
        score: the question for a score, 1 to 10 as a rule (direct-RLAIF).
        check: a yes-no question about one candidate, for rates such as the harmless rate.
    """

    name: str
    context: str
    candidate: str
    dialogue: bool
    pair: PairTask | None = None
    score: RatingTask | None = None
    check: RatingTask | None = None

    def asked_for_pairs(self) -> PairTask:
        """The question about pairs.

        Raises:
            ValueError: if the task has none.
        """
        if self.pair is None:
            raise ValueError(f"task {self.name!r} does not compare candidates: it has no 'pair' section")
        return self.pair

    def asked_for_ratings(self, question: Literal["score", "check"]) -> RatingTask:
        """The question about single candidates.

        Raises:
            ValueError: if the task does not ask it.
        """
        rating = self.score if question == "score" else self.check
        if rating is None:
            raise ValueError(f"task {self.name!r} has no {question!r} section")
        return rating


def task_names() -> list[str]:
    """Names of the tasks that ship with the package."""
    folder = resources.files("lightning_rlhf.judging.tasks")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_task(task: str) -> Task:
    """Read a task.

    Args:
        task: name of a task that ships with the package, or path of a YAML file.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if the file is no task; the message names the field.
    """
    path = Path(task).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"task {task!r}: no such file")
        return parse_task(path.stem, path.read_text(encoding="utf-8"), str(path))
    if task not in task_names():
        raise FileNotFoundError(
            f"no task {task!r}: name one of {', '.join(task_names())}, or the path of a .yaml file of your own"
        )
    file = resources.files("lightning_rlhf.judging.tasks") / f"{task}.yaml"
    return parse_task(task, file.read_text(encoding="utf-8"), f"task {task}")


def parse_task(name: str, text: str, source: str) -> Task:
    """Build a task from YAML.

    Args:
        name: name of the task.
        text: the YAML.
        source: where the text came from, for error messages.

    Raises:
        ValueError: if something is missing, unknown, or of the wrong kind; the message names the field.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML ({error})") from error
    section = _Section(raw, source, "")
    pair = section.take("pair", Mapping, None)
    task = Task(
        name=name,
        context=section.take("context", str),
        candidate=section.take("candidate", str),
        dialogue=section.take("dialogue", bool),
        pair=None if pair is None else _pair(_Section(pair, source, "pair.")),
        score=section.rating("score"),
        check=section.rating("check"),
    )
    section.finish()
    # a file with typos alone would otherwise be a task
    if task.pair is None and task.score is None and task.check is None:
        raise ValueError(f"{source}: asks nothing; give a 'pair', a 'score' or a 'check' section")
    return task


def _pair(section: _Section) -> PairTask:
    defaults = {f.name: f.default for f in fields(PairTask)}
    labels = section.strings("labels", defaults["labels"])
    # the verdict compares a first and a second candidate
    if len(labels) != 2:
        raise ValueError(f"{section.source}: pair.labels must be two, for the first and the second; got {labels}")
    prefers = section.take("prefers", str, defaults["prefers"])
    if prefers not in ("better", "worse"):
        raise ValueError(f"{section.source}: pair.prefers must be 'better' or 'worse'; got {prefers!r}")
    exemplars = []
    for number, row in enumerate(section.take("exemplars", list, [])):
        part = _Section(row, section.source, f"pair.exemplars[{number}].")
        exemplar = Exemplar(
            context=part.take("context", str),
            first=part.take("first", str),
            second=part.take("second", str),
            # YAML reads an unquoted 1 as a number
            label=str(part.take("label", (str, int))),
            rationale=part.take("rationale", str, ""),
        )
        part.finish()
        # an exemplar that answers otherwise would teach the judge a third label
        if exemplar.label not in labels:
            raise ValueError(f"{section.source}: {part.path}label must be one of {labels}; got {exemplar.label!r}")
        exemplars.append(exemplar)
    task = PairTask(
        preambles=section.preambles(),
        verdict=section.take("verdict", str),
        reasons=section.take("reasons", str),
        thinking=section.take("thinking", str),
        ending=section.ending(),
        prefers=prefers,
        labels=labels,
        exemplars=tuple(exemplars),
    )
    section.finish()
    return task


@dataclass
class _Section:
    """A mapping of a task file, whose fields are taken one by one."""

    raw: Any
    source: str
    path: str
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # a list or text in place of a section
        if not isinstance(self.raw, Mapping):
            name = self.path.rstrip(".") or "the file"
            raise ValueError(f"{self.source}: {name} must be a mapping; got {self.raw!r}")

    def take(self, name: str, kind: type | tuple[type, ...], default: object = ...) -> Any:
        self.taken.add(name)
        value = self.raw.get(name, default)
        # no default: the field is needed
        if value is ...:
            raise ValueError(f"{self.source}: {self.path}{name} is missing")
        # a default need not be of the kind, such as None for a section that is absent
        if value is not default and not isinstance(value, kind):
            raise ValueError(f"{self.source}: {self.path}{name} has the wrong kind; got {value!r}")
        # YAML blocks end with a line feed that nobody meant; endings may end with a space that somebody did
        return value.strip("\n") if isinstance(value, str) else value

    def strings(self, name: str, default: object) -> tuple[str, ...]:
        values = self.take(name, list, default)
        # YAML reads an unquoted yes as true, whose text "True" would be another label; a bool is an int
        texts = [value for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
        if not values or len(texts) < len(values) or not all(map(str, values)):
            raise ValueError(
                f"{self.source}: {self.path}{name} must be a list of strings (quote yes and no, which are booleans in "
                f"YAML); got {values!r}"
            )
        # two equal labels cannot be told apart
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"{self.source}: {self.path}{name} has equal entries; got {values!r}")
        return tuple(map(str, values))

    def preambles(self) -> dict[str, str]:
        part = _Section(self.take("preambles", Mapping), self.source, f"{self.path}preambles.")
        found = {name: part.take(name, str) for name in part.raw}
        unknown = sorted(set(found) - set(get_args(Style)))
        # a style with a typo would never be used
        if unknown or not found:
            raise ValueError(
                f"{self.source}: {self.path}preambles holds {' and '.join(get_args(Style))}, or one of them; "
                f"got {sorted(found)}"
            )
        return found

    def ending(self) -> str:
        ending: str = self.take("ending", str)
        # the label is the continuation of the ending
        if not ending.strip():
            raise ValueError(f"{self.source}: {self.path}ending is empty; nothing would ask for the label")
        return ending

    def rating(self, name: str) -> RatingTask | None:
        raw = self.take(name, Mapping, None)
        if raw is None:
            return None
        part = _Section(raw, self.source, f"{name}.")
        defaults = {f.name: f.default for f in fields(RatingTask)}
        labels = part.strings("labels", defaults["labels"])
        values = part.take("values", list, None)
        if values is None:
            # the values of other labels cannot be guessed
            if labels != defaults["labels"]:
                raise ValueError(f"{self.source}: {name}.labels needs {name}.values, one number per label")
            values = [float(label) for label in labels]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        # equal values would divide by zero in the map to [-1, 1]
        if not numbers or len(values) != len(labels) or len(set(values)) < 2:
            raise ValueError(
                f"{self.source}: {name}.values must be one number per label, and not all equal; got {values!r} for "
                f"{len(labels)} labels"
            )
        task = RatingTask(part.preambles(), part.ending(), labels, tuple(map(float, values)))
        part.finish()
        return task

    def finish(self) -> None:
        # a misspelled optional field would silently keep its default
        unknown = sorted(set(map(str, self.raw)) - self.taken)
        if unknown:
            raise ValueError(
                f"{self.source}: unknown field {self.path}{unknown[0]}; known are {', '.join(sorted(self.taken))}"
            )
