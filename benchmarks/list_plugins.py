"""How long `sslkit list-plugins` takes with many plugins installed.

    python benchmarks/list_plugins.py --plugins 30 --rounds 10

Each plugin is a package with its metadata, a component of every kind, a health rule and a README, in a temporary folder
on PYTHONPATH. The commands take turns, each in a process of its own, and the median of their times is told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sslkit.registry import KINDS

COMPONENT = '''
class {name}(sslkit.api.{base}):
    """The {kind} number {number} of its sort."""

    strength: float = 1.0
    """How strong it is."""

    def build(self, *facts):
        from {package}.maths import made

        return made(self.strength, *facts)

'''


def write_plugin(folder: Path, number: int) -> None:
    """A package as pip would leave it behind."""
    name, package = f"sslkit-neighbour-{number}", f"sslkit_neighbour_{number}"
    entries, source = [], "import sslkit.api\nimport sslkit.rules\n"
    for kind in KINDS:
        base = "".join(word.title() for word in kind.split("_"))
        entries.append(f"{kind}.neighbour_{number} = {package}:{base}{number}")
        source += COMPONENT.format(name=f"{base}{number}", base=base, kind=kind, number=number, package=package)
    entries.append(f"rule.neighbour_{number} = {package}:rule")
    source += 'rule = sslkit.rules.Rule("Nothing is wrong.", "info", "Nothing.", "None.", before=lambda facts: None)\n'
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: sslkit>=0.1\n\n"
        + "A line of README.\n" * 99
    )
    (info / "entry_points.txt").write_text("[sslkit]\n" + "\n".join(entries) + "\n")
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source)
    (folder / package / "maths.py").write_text("def made(*facts): ...\n")


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.plugins):
            write_plugin(Path(folder), number)
        bare = dict(os.environ)
        full = bare | {"PYTHONPATH": os.pathsep.join(filter(None, [bare.get("PYTHONPATH"), folder]))}
        sslkit = [sys.executable, "-m", "sslkit"]
        commands = {
            "python -c pass": ([sys.executable, "-c", "pass"], bare),
            "sslkit --help": ([*sslkit, "--help"], full),
            "sslkit list-plugins, none of them": ([*sslkit, "list-plugins"], bare),
            f"sslkit list-plugins, {asked.plugins} plugins": ([*sslkit, "list-plugins"], full),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(asked.rounds):
            for name, (command, environment) in commands.items():
                times[name].append(seconds(command, environment))
    print(f"median of {asked.rounds}, and the slowest")
    for name, taken in times.items():
        print(f"{name:40} {statistics.median(taken):.3f} s {max(taken):.3f} s")


if __name__ == "__main__":
    main()
