"""Rules over a recipe and over a run: what is wrong, how it shows, what mends it, and a verdict in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sslkit import registry
from sslkit.errors import UserError, did_you_mean, printable
from sslkit.rules import RANKS, Course, Facts, Finding, Points, Rule, Seen, Severity, ordered
from sslkit.run_directory import died, read_json, read_metrics, refuse_strays

EXIT_CODES: Mapping[Severity, int] = {"error": 2, "warning": 1, "info": 0}
"""What `sslkit check` and `sslkit doctor` end with, by the worst finding."""


# ---------------------------------------------------------------- rules


@registry.cached
def rules() -> tuple[Mapping[str, Rule], tuple[str, ...]]:
    """Every installed rule by its id, and a line for each one that is broken, which is left out."""
    found: dict[str, Rule] = {}
    broken: list[str] = []
    for name in registry.names(registry.RULE):
        try:
            rule = registry.load(registry.RULE, name)
        except UserError as error:
            broken += error.lines
            continue
        if isinstance(rule, Rule):
            found[name] = rule
        else:
            origin = registry.find(registry.RULE, name).origin
            broken.append(f"rule {name!r} from {origin} is not a sslkit.rules.Rule; it is left out")
    return found, tuple(broken)


def check_accepted(accepted: Iterable[str]) -> None:
    """Refuse ids that name no rule.

    Raises:
        UserError: for each such id.
    """
    known = sorted(rules()[0])
    wrong = [a for a in accepted if a not in known]
    if wrong:
        raise UserError(
            *(
                f"train.accept: {a!r} is no finding{did_you_mean(a, known)} (all of them: sslkit list-plugins --kind "
                "rule)"
                for a in wrong
            )
        )


def before(facts: Facts) -> list[Finding]:
    """What can be told from the parts alone."""
    return _findings(facts, lambda rule: rule.before, None)


def during(course: Course) -> list[Finding]:
    """What the records of a run show so far."""
    return _findings(course, lambda rule: rule.during, course.step)


def _findings(seen_by: Any, which: Callable[[Rule], Callable[[Any], str | Seen | None] | None],
              step: int | None) -> list[Finding]:  # fmt: skip
    found: dict[str, Finding] = {}
    for name, rule in rules()[0].items():
        look = which(rule)
        if look is None:
            continue
        try:
            seen = look(seen_by)
            seen = seen if seen is None or isinstance(seen, Seen) else Seen(seen)
        except Exception as error:  # a stranger's rule must not end a run
            seen = Seen(
                f"the rule itself failed: {type(error).__name__}: {error}", "info",
                cause=f"a mistake in {registry.find(registry.RULE, name).origin}", fix="tell its author",
            )  # fmt: skip
        if seen is not None:
            found[name] = _finding(name, rule, seen, step)
    return explained(found.values())


def _finding(name: str, rule: Rule, seen: Seen, step: int | None) -> Finding:
    def chosen(attribute: str) -> Any:
        own = getattr(seen, attribute)
        return getattr(rule, attribute) if own is None else own

    return Finding(
        name, chosen("severity"), chosen("what"), seen.text, chosen("cause"), chosen("fix"), rule.source, chosen("key"),
        step if seen.step is None else seen.step,
    )  # fmt: skip


def explained(found: Iterable[Finding]) -> list[Finding]:
    """Findings in the order to tell them in; those that others bring about name these.

    A cause is as grave as what it brought about: a warning that explains an error is an error, and told before it.
    """
    found, known = list(found), rules()[0]
    causes = {f.id: known[f.id].explains for f in found if f.id in known and f.severity != "info"}
    found = [replace(f, because=tuple(c for c, ends in causes.items() if f.id in ends and c != f.id)) for f in found]
    gravest: dict[str, Severity] = {
        cause: min((f.severity for f in found if cause in f.because), key=RANKS.__getitem__, default="info")
        for cause in causes
    }
    return ordered(
        replace(f, severity=min(f.severity, gravest.get(f.id, "info"), key=RANKS.__getitem__)) for f in found
    )


# ---------------------------------------------------------------- what is told

UNMEASURED = "the verdict rests on spread, rank and LiDAR, which find broken runs and do not rank sound ones"
"""What a verdict ends with where quality could not be measured, behind the reason."""


@dataclass(frozen=True)
class Examination:
    """What the doctor has to say."""

    title: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """Facts that are no findings, one line each."""
    broken: int = 0
    """Rules that are installed and could not be asked."""
    over: bool = True
    """Whether the run has ended, or has not begun: a verdict while it goes on is one so far."""
    unseen: bool = False
    """Whether the run was begun and nothing of its training is recorded."""
    unproven: str = ""
    """Why finding nothing does not make a run healthy, where it does not."""
    unmeasured: str = ""
    """Why nothing tells how good the features are, where nothing does: `no labels`, `no labelled test images`."""

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(f.severity == severity for f in self.findings)

    @property
    def exit_code(self) -> int:
        """2 if there are errors, 1 if there are warnings, 0 otherwise."""
        return max((EXIT_CODES[f.severity] for f in self.findings), default=0)

    @property
    def verdict(self) -> str:
        """One line: whether to trust the run, and what to do first."""
        missing = "" if not self.broken else f" (rules that are broken and were not asked: {self.broken})"
        rests = f"; {self.unmeasured}: {UNMEASURED}" if self.unmeasured and not self.count("error") else ""
        return self._judged + rests + missing

    @property
    def _judged(self) -> str:
        errors, warnings = self.count("error"), self.count("warning")
        if errors and all(f.id == "no_quality_metric" for f in self.findings if f.severity == "error"):
            return "cannot be judged: nothing recorded tells good features from useless ones; measure kNN or a probe"
        if self.unseen and not errors:
            return "cannot be judged: no step was seen"
        if errors:
            again = " and start again from epoch 0" if self._began else ""
            return f"not trustworthy: mend the {'error' if errors == 1 else f'{errors} errors'}{again}"
        if warnings:
            return f"usable, with {'a warning' if warnings == 1 else f'{warnings} warnings'} to look at"
        found = "healthy" if not self.unproven else "nothing found"
        return f"{found}{'' if self.over else ' so far'}{f'; {self.unproven}' if self.unproven else ''}"

    @property
    def _began(self) -> bool:
        return any(f.severity == "error" and f.step is not None for f in self.findings)

    def text(self) -> str:
        """All of it, for a terminal."""
        lines = [f"sslkit doctor: {self.title}"]
        for finding in self.findings:
            lines += finding_lines(finding)
        lines += [f"LOG      {note}" for note in self.notes]
        return "\n".join(map(printable, [*lines, f"VERDICT  {self.verdict}"]))

    def as_json(self) -> str:
        """All of it, for a program."""
        return json.dumps({
            "title": self.title, "verdict": self.verdict, "exit_code": self.exit_code, "over": self.over,
            "findings": [asdict(f) for f in self.findings], "notes": list(self.notes),
        }, indent=1)  # fmt: skip


MARKS: Mapping[Severity, str] = {"error": "ERROR", "warning": "WARN", "info": "INFO"}


def finding_lines(finding: Finding) -> list[str]:
    """A finding as lines for a terminal."""
    mark = MARKS[finding.severity]
    lines = [f"{mark:8} {finding.what.rstrip('.')} [{finding.id}]", f"         seen: {finding.evidence}"]
    if finding.key and finding.severity != "info":
        lines.append(f"         set by: {': '.join(filter(None, [finding.where, finding.key]))}")
    if finding.because:
        lines.append(f"         follows from: {', '.join(finding.because)}")
    elif finding.cause:
        lines.append(f"         likely cause: {finding.cause}")
    if finding.severity != "info":
        lines.append(f"         fix: {finding.fix}")
        lines.append(f"         source: {finding.source}")
    return lines


# ---------------------------------------------------------------- a run


def examine(course: Course, title: str, *, notes: Iterable[str] = (), accepted: Iterable[str] = ()) -> Examination:
    """Look at a run from all sides. Warnings that its recipe accepts are told as info; an error stays one.

    A rule that fires both before and during training is told once, with what was seen in training.
    """
    found = {f.id: f for f in before(course.facts)}
    for finding in during(course) if course.records or course.status else ():
        known = found.get(finding.id)
        if known is None or EXIT_CODES[finding.severity] >= EXIT_CODES[known.severity]:
            found[finding.id] = finding
    meant = [
        replace(
            f, severity="error" if f.severity == "error" else "info", evidence=f"{f.evidence} (accepted by the recipe)"
        )
        if f.id in accepted
        else f
        for f in found.values()
    ]
    if course.facts.recipe is None:  # another program's run: there is no key of a recipe to blame
        meant = [replace(f, key="", fix=without_keys(f.fix)) for f in meant]
    broken = rules()[1]
    over = course.status.get("status") in (None, "done", "failed", "lost")
    unseen = bool(course.status) and not course.step
    told = tuple(explained(meant))
    notes = (*notes, *_figures(course), *broken)
    return Examination(title, told, notes, len(broken), over, unseen, _unproven(course), _unmeasured(course))


_SLOT = "backbone|data_source|loss|observers|optimizer|predictor|projector|target_updater|train|view_generator"
_SET = rf"(?:{_SLOT})(?:\.\w+)+(?: = (?:\{{[^{{}}()]*\}}|\[[^()]*\]|'[^']*'|[\w.-]+))?"
_KEYS = re.compile(rf"\s*\({_SET}(?:, {_SET})*\)")


def without_keys(fix: str) -> str:
    """What is to be done, without brackets that hold keys of a recipe and nothing else, as `(optimizer.lr)`."""
    return _KEYS.sub("", fix)


RISEN = 0.08
"""By how much accuracy has to rise to be no chance, where the random network's is not known: three times what 1000
images leave open."""


def _unproven(course: Course) -> str:
    """Why another program's accuracy does not show that anything is learnt; nothing if it does, or there is none."""
    if course.facts.recipe is not None:
        return ""
    curves = [points for key in ("knn_top1", "probe_top1") if (points := _learnt(course, key)).values]
    if not curves or course.points("knn_top1").steps[:1] == [0]:
        return ""
    if any(len(c.values) > 2 and c.values[-1] >= c.values[0] + RISEN for c in curves):
        return ""
    few = max(len(c.values) for c in curves) < 3
    why = "accuracy was measured once or twice" if few else "accuracy has not clearly risen"
    return f"{why}, and there is no figure of the random network to compare with"


def _learnt(course: Course, key: str) -> Points:
    """What was measured of an accuracy; of a probe without step 0, where its weights are zero and it knows nothing."""
    points = course.points(key)
    untrained = points.steps.count(0) if key == "probe_top1" else 0
    return Points(points.steps[untrained:], points.epochs[untrained:], points.values[untrained:])


def _unmeasured(course: Course) -> str:
    """Which labels a run has not, if nothing recorded is an accuracy all the same."""
    measured = course.facts.quality or ("knn_top1", "probe_top1")
    if course.facts.labelled is not False or any(course.points(key).values for key in measured):
        return ""
    return "no labels" if course.facts.classes is None else "no labelled test images"


def _figures(course: Course) -> list[str]:
    """What the measures of quality began and stand at, as a line each."""
    lines = []
    for key, name in (("knn_top1", "kNN top-1"), ("probe_top1", "linear probe top-1")):
        steps, _, values = course.points(key)
        if len(values) > 1:
            first = f"the {course.facts.first_network}" if key == "knn_top1" else "the untrained probe, chance"
            floor = f" ({first})" if steps[0] == 0 and course.status else ""
            lines.append(f"{name} {values[0]:.4f} at step {steps[0]}{floor} -> {values[-1]:.4f} at step {steps[-1]}")
    return lines


def read_course(run: Path) -> Course:
    """The records of a run directory, with what was known before it began.

    Raises:
        UserError: there is no run.
    """
    if not run.is_dir():
        raise UserError(f"{run}: {'is a file' if run.exists() else 'is not there'}; give a run directory such as "
                        "runs/NAME, or a log of another program with --csv")  # fmt: skip
    refuse_strays(run)
    facts = read_json(run / "facts.json")
    try:
        records: list[Mapping[str, Any]] = [r for r in read_metrics(run) if isinstance(r, dict)]
    except OSError:
        records = []
    if not facts and not records:
        inside = ", ".join(str(below.parent) for below in sorted(run.glob("*/metrics.jsonl")))
        raise UserError(f"{run}: is no run directory (it has no metrics.jsonl); give {inside or 'one as runs/NAME'}")
    try:
        known = Facts.model_validate(facts)
    except ValueError as error:
        raise UserError(f"{run / 'facts.json'}: cannot be read: {str(error).partition(chr(10))[0]}") from None
    return Course(known, read_json(run / "status.json"), records)


def examine_run(run: Path) -> Examination:
    """Look at a run that sslkit made, while it goes on or after it.

    Raises:
        UserError: there is no run.
    """
    course = read_course(run)
    facts = course.facts
    title = facts.name or run.name
    if facts.total_steps:
        title += f", step {course.step} of {facts.total_steps}"
    status = course.status.get("status")
    notes = [f"{run}: {status}" if status else f"{run}"]
    if died(course.status):
        notes[0] += (
            f", but process {course.status['pid']} is gone: it died without a word (killed, out of memory, a power "
            "cut); the same command goes on from the newest checkpoint"
        )
    elif course.status.get("message"):
        notes[0] += f" ({course.status['message']})"
    return examine(course, title, notes=notes, accepted=facts.accepted)
