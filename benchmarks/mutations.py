"""Take away one safeguard at a time, in a copy of the tree, and see the test that stands for it fail.

    python benchmarks/mutations.py [--jobs 2] [NAME ...]

Each mutation replaces a piece of the source, which has to be there exactly once, and names a test. In the copy as it is
all of these tests pass; with its mutation each fails. A safeguard without such a test would only look like one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("sslkit", "plugins", "tests", "recipes", "pyproject.toml", "benchmarks/crash.json")


@dataclass(frozen=True)
class Mutation:
    """A safeguard, how it is taken away, and the test that has to notice."""

    name: str
    file: str
    old: str
    new: str
    test: str


GOES_ON = "tests/test_trainer.py::test_going_on_gives_the_same_run"
GOLDEN = "tests/test_resume.py::test_the_run_of_an_earlier_version_goes_on"
CHECKPOINT, STATE, TRAINER = "sslkit/checkpoint.py", "sslkit/state.py", "sslkit/trainer.py"
MUTATIONS = [
    Mutation(
        "nothing is flushed to disk", CHECKPOINT, "        os.fsync(handle)\n", "        pass\n",
        "tests/test_faults.py::test_all_is_flushed_before_the_rename_and_the_folders_after_it",
    ),
    Mutation(
        "files are flushed, folders are not", CHECKPOINT, "        _sync(staging)\n", "",
        "tests/test_faults.py::test_all_is_flushed_before_the_rename_and_the_folders_after_it",
    ),
    Mutation(
        "written in place, not renamed", CHECKPOINT,
        '    staging = folder / f".tmp-{final.name}-{os.getpid()}"\n', "    staging = final\n",
        "tests/test_faults.py::test_a_kill_at_each_point_leaves_a_sound_newest_checkpoint",
    ),
    Mutation(
        "what was written is not read back", CHECKPOINT,
        '            _read_back(staging / f"{name}.safetensors", tensors)\n', "",
        "tests/test_faults.py::test_what_was_written_wrongly_is_noticed_at_once",
    ),
    Mutation(
        "pruned without a check", CHECKPOINT, "        _checked(final)\n", "        pass\n",
        "tests/test_faults.py::test_what_changes_between_writing_and_pruning_is_noticed",
    ),
    Mutation(
        "hashes are not compared", CHECKPOINT,
        " or _digest(path / name) != expected", "",
        "tests/test_checkpoint.py::test_any_flipped_or_missing_byte_is_noticed",
    ),
    Mutation(
        "the manifest may change", CHECKPOINT, "not unsealed and raw != sealed(manifest)", "False",
        "tests/test_checkpoint.py::test_no_byte_of_a_manifest_may_change",
    ),
    Mutation(
        "the best checkpoint is pruned", CHECKPOINT, "    kept = {best(folder), *paths[-keep:]}\n",
        "    kept = {*paths[-keep:]}\n", "tests/test_checkpoint.py::test_the_newest_and_the_best_are_kept",
    ),
    Mutation(
        "a half-removed checkpoint keeps its name", CHECKPOINT,
        '            doomed = path.with_name(f".old-{path.name}")',
        "            doomed = path\n            _remove(path)",
        "tests/test_faults.py::test_a_kill_at_each_point_leaves_a_sound_newest_checkpoint",
    ),
    Mutation(
        "a moved run directory is made anew", CHECKPOINT, "    if not folder.parent.is_dir():",
        "    folder.parent.mkdir(exist_ok=True)\n    if False:",
        "tests/test_faults.py::test_a_run_directory_that_is_moved_does_not_come_back_empty",
    ),
    Mutation(
        "names of tensors may meet", CHECKPOINT, 'path in tensors or path in ("", "__metadata__")', 'path == ""',
        "tests/test_checkpoint.py::test_names_that_meet_are_two_tensors",
    ),
    Mutation(
        "the target begins anew", STATE, '        parts.model.load_state_dict(found.parts["model"])\n',
        '        own = {k: v for k, v in parts.model.state_dict().items() if k.startswith("target.")}\n'
        '        parts.model.load_state_dict({**found.parts["model"], **own})\n', GOES_ON,
    ),
    Mutation(
        "the optimizer begins anew", STATE,
        '        parts.optimizer.load_state_dict(_in_layout(parts.optimizer, found.parts["optimizer"]))\n', "", GOES_ON,
    ),
    Mutation(
        "the loss begins anew", STATE, '        parts.loss.load_state_dict(found.parts["loss"])\n', "", GOLDEN,
    ),
    Mutation(
        "the observers begin anew", STATE, '        bus.load_state_dict(found.parts["observers"])\n', "", GOES_ON,
    ),
    Mutation(
        "random numbers are not keyed by the step", TRAINER,
        'torch.manual_seed(randomness.key(self.info.seed, f"step/{rank}" if rank else "step", self.step))',
        "torch.manual_seed(torch.seed())",
        "tests/test_faults.py::test_stray_draws_are_the_same_after_going_on",
    ),
    Mutation(
        "views are drawn from one generator", "sslkit/data.py",
        'drawn = self.viewing.draw(indices, randomness.generator(self.run.seed, "views", step))',
        "self.stream = getattr(self, 'stream', torch.Generator().manual_seed(0))\n"
        "        drawn = self.viewing.draw(indices, self.stream)", GOES_ON,
    ),
    Mutation(
        "originals are cut by their neighbours' rows", "sslkit/viewing.py",
        "values[row] for name", "values[row - 1] for name",
        "tests/test_viewing.py::test_every_crop_is_its_own_images_by_its_own_row",
    ),
    Mutation(
        "boxes are drawn for other images' sizes", "sslkit/viewing.py", "draw_sized(self.sizes[indices],",
        "draw_sized(self.sizes[: len(indices)],",
        "tests/test_viewing.py::test_every_crop_is_its_own_images_by_its_own_row",
    ),
    Mutation(
        "the data begins anew", "sslkit/data.py", "map(self.draw, range(start, stop))",
        "map(self.draw, range(stop - start))", GOES_ON,
    ),
    Mutation(
        "records are not cut to the checkpoint's", "sslkit/run_directory.py",
        "                self._metrics.truncate(whole)\n", "",
        "tests/test_run_directory.py::test_records_are_lines_and_are_cut_to_an_offset",
    ),
    Mutation(
        "a record that was cut short passes", "sslkit/run_directory.py",
        "if self._metrics.write(line) != len(line):", "if self._metrics.write(line) is None:",
        "tests/test_faults.py::test_a_record_of_which_the_end_finds_no_room_is_an_error",
    ),
    Mutation(
        "any recipe's checkpoint will do", "sslkit/resuming.py",
        '    if found and found.facts["recipe_hash"] != parts.recipe.hash():\n', "    if False:\n",
        "tests/test_faults.py::test_a_checkpoint_of_another_run_is_refused",
    ),
    Mutation(
        "any data will do", "sslkit/resuming.py",
        'found.facts["data_fingerprint"] != parts.data.fingerprint', "False",
        "tests/test_cli.py::test_changed_data_is_refused_on_going_on",
    ),
]  # fmt: skip


def copied(to: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def tested(tree: Path, *tests: str) -> tuple[int, str]:
    """pytest's exit code, and what it said, on a tree whose packages stand before the installed ones."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "plugins")))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree, env=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def survived(mutation: Mutation) -> str:
    """What is wrong with a mutation, in words; empty if its test notices it."""
    with tempfile.TemporaryDirectory() as name:
        tree = copied(Path(name))
        source = (tree / mutation.file).read_text(encoding="utf-8")
        (tree / mutation.file).write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        code, said = tested(tree, mutation.test)
    if code == 1:  # tests were run, and some failed
        return ""
    return f"{mutation.test} passes" if code == 0 else f"pytest ended with {code}: {said[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; all without")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only their names, once each is found in the code")
    options = parser.parse_args()
    for mutation in MUTATIONS:
        if (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) != 1:
            print(f"{mutation.name}: {mutation.file} does not have what it replaces, or has it twice")
            return 2
    if options.list:
        print("\n".join(mutation.name for mutation in MUTATIONS))
        return 0
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    with tempfile.TemporaryDirectory() as name:
        code, said = tested(copied(Path(name)), *dict.fromkeys(m.test for m in chosen))
    if code:
        print(said)
        print("the tests fail without any mutation")
        return 2
    problems = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, problem in zip(chosen, pool.map(survived, chosen), strict=True):
            problems.append(problem)
            print(f"{mutation.name}: {problem or 'noticed'}", flush=True)
    print(f"{problems.count('')} of {len(chosen)} noticed")
    return 1 if any(problems) else 0


if __name__ == "__main__":
    sys.exit(main())
