"""Measures how often the doctor is right, on runs whose fault is known: it was put there.

    python benchmarks/doctor.py --out RUNS [--seeds 0 1 2] [--only ID ...] [--write]

Each sound run and each fault of benchmarks/doctor_cases.py is trained once for each seed, and all of its records are
given to the doctor one after the other, as during training. What is printed:

- named first: of the faults, the share whose name is the first thing that the doctor says; named: that it says at all.
- flagged: the share of faults with an error or a warning of whatever kind.
- precise: of the errors and warnings on faulty runs, the share that are the fault or what it brought about: a symptom
  (SYMPTOMS, findings about what a run does) that the sound run with the same seed does not show.
- false alarms: errors and warnings on sound runs, at any of their records.

Runs stay in the folder RUNS and are not trained again; remove a run's folder to train it anew. With --write the
figures go to benchmarks/doctor.json. Thresholds were calibrated on seeds 10 to 12; report others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from doctor_cases import FAULTS, HEALTHY, NOT_IN_THE_CATALOGUE, Case

from sslkit import doctor
from sslkit.build import build
from sslkit.environment import environment
from sslkit.errors import RunFailed
from sslkit.facts import gather
from sslkit.recipe import read_recipe
from sslkit.rules import RANKS, Course, Finding
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer

HERE = Path(__file__).parent
RESULTS = HERE / "doctor.json"
SYMPTOMS = frozenset((
    "collapse", "dimensional_collapse", "partial_collapse", "cosine_high", "target_equals_online", "target_diverges",
    "target_not_following", "tau_not_applied", "loss_rise", "loss_at_chance", "loss_not_falling", "rate_oscillation",
    "gradient_spike", "no_gradient", "not_finite", "knn_not_improving", "knn_falling", "prototype_collapse",
    "resume_reset",
))  # fmt: skip
"""Findings that state what a run did, not what its parts are."""


# ---------------------------------------------------------------- training


def train(case: Case, seed: int, folder: Path) -> None:
    """Train one run, as `sslkit train` would if it did not refuse, and leave what the doctor reads."""
    if (folder / "status.json").is_file() and json.loads((folder / "status.json").read_text())["status"] != "running":
        return
    torch.set_num_threads(1)
    files = RunDirectory(folder)
    parts = build(read_recipe("quickstart", [f"seed={seed}", *case.overrides]), torch.device("cpu"), lambda text: None)
    files.open_metrics(0)
    trainer = Trainer(parts, files, say=lambda text: None)
    trainer.save = lambda: None  # type: ignore[method-assign]
    if case.plant is not None:
        case.plant(trainer)
    files.write("facts.json", gather(parts).model_dump_json(exclude_none=True))
    files.status("running")
    started = time.process_time()
    facts: dict[str, Any] = {}
    try:
        trainer.fit(parts.run.total_steps)
        status = "done"
    except RunFailed as error:
        if int(trainer.bad_step) < 0:
            raise RuntimeError(f"{case.id}: planted wrongly: {error}") from error
        status, facts = "failed", {"reason": "not_finite", "step": int(trainer.bad_step) + 1}
    seconds = round(time.process_time() - started, 1)
    files.status(status, **({"step": trainer.step} | facts), cpu_seconds=seconds)
    files.close()


# ---------------------------------------------------------------- examining


@dataclass
class Result:
    """What the doctor said of one run."""

    case: Case
    seed: int
    said: list[Finding]
    """In its order, at the end."""
    alarms: dict[str, Finding] = field(default_factory=dict)
    """Errors and warnings at any record, by id, the gravest of each."""
    knn: tuple[float, float] | None = None

    @property
    def told(self) -> list[str]:
        """Ids of errors and warnings in the doctor's order; of infos too where that is all a fault can be."""
        return [f.id for f in self.said if f.severity != "info" or f.id in self.case.names]


def examine(case: Case, seed: int, folder: Path) -> Result:
    """Give a run's records to the doctor one by one, and then all of them."""
    whole = doctor.read_course(folder)
    result = Result(case, seed, list(doctor.examine(whole, case.id).findings))
    live = Course(whole.facts, {"status": "running"})
    found = list(result.said)
    for record in whole.records:
        live.add(record)
        found += doctor.during(live)
    for finding in found:
        known = result.alarms.get(finding.id)
        if finding.severity != "info" and (known is None or RANKS[finding.severity] < RANKS[known.severity]):
            result.alarms[finding.id] = finding
    knn = whole.points("knn_top1").values
    result.knn = (knn[0], knn[-1]) if knn else None
    return result


def belongs(result: Result, id: str, sound: Iterable[str]) -> bool:
    """Whether a finding is the fault's name, or a symptom that the sound twin does not show."""
    return id in (*result.case.names, *result.case.brings) or (id in SYMPTOMS and id not in sound)


def summary(results: list[Result]) -> dict[str, Any]:
    """The figures of the head of this file."""
    sound = {(r.case.method, r.seed): set(r.alarms) for r in results if r.case in HEALTHY}
    faulty = [r for r in results if r.case in FAULTS]
    unlisted = [r for r in results if r.case in NOT_IN_THE_CATALOGUE]
    healthy = [r for r in results if r.case in HEALTHY]
    alarms = [(r, id) for r in faulty for id in r.told]
    right = [belongs(r, id, sound.get((r.case.method, r.seed), ())) for r, id in alarms]
    false = [f for r in healthy for f in r.alarms.values()]
    return {
        "faulty_runs": len(faulty),
        "named_first": sum(bool(r.told) and r.told[0] in r.case.names for r in faulty),
        "named": sum(bool({*r.told} & {*r.case.names}) for r in faulty),
        "flagged": sum(bool(r.told) for r in faulty),
        "findings_on_faulty_runs": len(right),
        "findings_that_belong": sum(right),
        "sound_runs": len(healthy),
        "sound_runs_without_error": sum(all(f.severity != "error" for f in r.alarms.values()) for r in healthy),
        "sound_runs_without_warning": sum(not r.alarms for r in healthy),
        "false_alarms": Counter(f"{f.severity}: {f.id}" for f in false),
        "unlisted_faults": len(unlisted),
        "unlisted_flagged": sum(bool(r.told) for r in unlisted),
    }


def table(results: list[Result]) -> list[str]:
    """One line a case: the confusion, seeds together."""
    lines = []
    for case in dict.fromkeys(r.case.id for r in results):
        runs = [r for r in results if r.case.id == case]
        first = Counter(r.told[0] if r.told else "-" for r in runs)
        rest = Counter(id for r in runs for id in r.told[1:])
        live = Counter(id for r in runs for id in r.alarms if id not in r.told)
        good = sum(bool(r.told) and r.told[0] in r.case.names for r in runs)
        mark = f"{good}/{len(runs)}" if runs[0].case.names else "   "
        knn = " ".join(f"{r.knn[0]:.2f}-{r.knn[1]:.2f}" for r in runs if r.knn)
        lines.append(
            f"{case:24} {mark:4} first: {_counted(first)}; also: {_counted(rest)}; for a while: {_counted(live)}; "
            f"kNN {knn}"
        )
    return lines


def _counted(counter: Counter[str]) -> str:
    return ", ".join(id if n == 1 else f"{id} x{n}" for id, n in counter.most_common()) or "-"


# ---------------------------------------------------------------- the command


def main() -> None:
    """Train what is missing, examine everything, print and maybe write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="ids of cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    asked = parser.parse_args()
    cases = [c for c in (*HEALTHY, *FAULTS, *NOT_IN_THE_CATALOGUE) if not asked.only or c.id in asked.only]
    runs = [(case, seed, asked.out / f"{case.id}-{seed}") for seed in asked.seeds for case in cases]
    if asked.jobs > 1:
        with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
            list(pool.map(_train_by_id, [(case.id, seed, folder) for case, seed, folder in runs]))
    for case, seed, folder in runs:
        train(case, seed, folder)
    results = [examine(*run) for run in runs]
    print("\n".join(table(results)))
    figures = summary(results)
    print(json.dumps(figures, indent=1))
    if asked.write:
        _write(asked.seeds, results, figures)


def _train_by_id(run: tuple[str, int, Path]) -> None:
    by_id = {case.id: case for case in (*HEALTHY, *FAULTS, *NOT_IN_THE_CATALOGUE)}
    train(by_id[run[0]], run[1], run[2])


def _write(seeds: list[int], results: list[Result], figures: dict[str, Any]) -> None:
    where = environment(sys.argv, [], "cpu", 1, "")
    RESULTS.write_text(json.dumps({
        "command": f"python benchmarks/doctor.py --out RUNS --seeds {' '.join(map(str, seeds))} --write",
        "seeds": seeds, "commit": where["git"]["commit"], "changed": where["git"]["changed"],
        "hardware": f"{where['cpus']} cores {where['processor']}", "torch": where["packages"]["torch"],
        "figures": figures,
        "runs": [
            {"case": r.case.id, "row": r.case.row, "seed": r.seed, "names": r.case.names, "said": r.told,
             "for_a_while": sorted(set(r.alarms) - set(r.told)), "knn": r.knn}
            for r in results
        ],
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
