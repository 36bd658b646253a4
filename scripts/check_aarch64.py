#!/usr/bin/env python3
"""Answers questions on an emulated 64-bit ARM processor and compares them, token by token, with this machine's.

    python scripts/check_aarch64.py [--work build/aarch64]

The runtime that a Jetson would install runs there for real: ARM wheels of this package's extra `cpu`, Debian's Python
for ARM, `holov-export ask` over bundles that were exported here. Two are asked at three budgets: the demo model, and a
random LLaVA whose answers are long. Each is decoded by ONNX Runtime GenAI and by plain ONNX Runtime.

Needs Linux on x86-64, this package with its extras `export` and `cpu` on Python 3.11 or newer, Debian's package sources
for apt, a package index, and as root once:

    apt-get install qemu-user-static

Nothing else is installed or mounted, and root is not needed: Debian's packages for ARM are fetched and unpacked with an
apt state of their own. All of it lies below --work (500 MB), is kept for the next time, and can be deleted.

It is no measure of speed: emulation takes ten to eighty times as long. Ends with status 1 where tokens differ, and with
3 where something is missing. Tried with qemu 7.2; what it trips over is said at `CPU`, `CPUINFO` and `Guest`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import one_line
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

EMULATOR = "qemu-aarch64-static"
PACKAGES = ("python3", "libstdc++6", "libgomp1")
#: the newest first, as pip wants them; glibc of Debian 12 is 2.36, of JetPack 6 2.35
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
#: kin of the cores of Orin (A78AE); with qemu's "max" numpy's matmul warns of divisions by zero that are none
CPU = "cortex-a76"
#: ONNX Runtime reads /proc/cpuinfo, and an x86 one beside /sys makes its import end in a segmentation fault
CPUINFO = """processor\t: {number}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1

"""
SCENE, QUESTION = "scene_1.png", "how many digits are there?"
BUDGETS = {"demo": (1, 16, 144), "random": (1, 16, 64)}
DECODERS = ("genai", "ort")
NEW_TOKENS = 48


class MissingError(Exception):
    """This machine lacks something."""


@dataclass(frozen=True)
class Question:
    """One run of `holov-export ask`, the same words on both processors."""

    bundle: str
    budget: int
    decoder: str

    def words(self, work: Path) -> list[str]:
        picture = ROOT / "holov_export/data/demo-scenes" / SCENE
        line = ["ask", str(work / "bundles" / self.bundle), str(picture), QUESTION, "--json", "--threads", "1"]
        line += ["--budget", str(self.budget), "--decoder", self.decoder, "--provider", "cpu"]
        return [*line, "--max-new-tokens", str(NEW_TOKENS)]


@dataclass(frozen=True)
class Guest:
    """An ARM Python under emulation, with this package's wheel and what it needs.

    `-L` makes the guest's libraries appear at the host's paths; no chroot and no binfmt. Bundles are named by the
    host's own absolute paths: through `-L` a graph's external data would count as outside of its folder.
    """

    root: Path
    site: Path

    def run(self, *words: str) -> str:
        python = self.root / "usr/bin/python3"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"QEMU_CPU": CPU, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        return output_of([EMULATOR, "-L", str(self.root), str(python), *words], environment)


def output_of(line: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command printed.

    Raises:
        MissingError: it failed; with the end of what it said.
    """
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if ended.returncode:
        said = (ended.stderr or ended.stdout)[-2000:]
        raise MissingError(f"{Path(line[0]).name} ended with {ended.returncode}: {' '.join(line[1:6])} ...\n{said}")
    return ended.stdout


def check_machine() -> None:
    """Refuse a machine on which this cannot run."""
    for program, package in ((EMULATOR, "qemu-user-static"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(program) is None:
            raise MissingError(f"'{program}' is not here. On Debian, as root: apt-get install {package}")
    if sys.version_info < (3, 11):
        raise MissingError(
            "GenAI's builder needs Python 3.11. Name a newer one: PYTHON=python3.12 scripts/check_aarch64"
        )


def unpack_guest(work: Path) -> Path:
    """A folder with Debian's Python for ARM and the libraries under it; made once."""
    root = work / "root"
    if (root / "usr/bin/python3").exists():
        return root
    apt = work / "apt"
    archives = apt / "cache/archives"
    for folder in (apt / "state/lists/partial", archives / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").write_text("", encoding="utf-8")  # nothing is installed there, so that all of it is fetched
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::State": str(apt / "state"),
        "Dir::State::status": str(apt / "status"),
        "Dir::Cache": str(apt / "cache"),
        "Dir::Log": str(apt),
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    output_of(["apt-get", *options, "update"])
    output_of(["apt-get", *options, "--yes", "--download-only", "install", *PACKAGES])
    unfinished = work / "root-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for archive in sorted(archives.glob("*.deb")):
        output_of(["dpkg-deb", "--extract", str(archive), str(unfinished)])
    proc = unfinished / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "cpuinfo").write_text("".join(CPUINFO.format(number=number) for number in range(2)), encoding="utf-8")
    unfinished.rename(root)
    return root


def install_wheels(work: Path, root: Path) -> Path:
    """A folder with the ARM wheels of this checkout's extra `cpu`; made anew when the dependencies change."""
    python = (root / "usr/bin/python3").resolve().name.removeprefix("python")
    site, dist = work / "site", work / "dist"
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
    stamp = site / "installed-for"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    shutil.rmtree(dist, ignore_errors=True)
    output_of([*pip, "wheel", "--no-deps", "--wheel-dir", str(dist), str(ROOT)])
    (wheel,) = dist.glob("*.whl")
    target = ["--target", str(site), "--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted.hexdigest():
        shutil.rmtree(site, ignore_errors=True)
        output_of([*pip, "install", *target, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[cpu]"])
        stamp.write_text(wanted.hexdigest(), encoding="utf-8")
    else:
        output_of([*pip, "install", *target, "--no-deps", "--upgrade", str(wheel)])
    return site


def export_bundles(work: Path) -> None:
    """The demo model and a random LLaVA whose answers do not end early, both exported on this machine."""
    from checkpoints import TinyLlava, write_checkpoint

    bundles = work / "bundles"
    bundles.mkdir(exist_ok=True)
    checkpoint = write_checkpoint(work / "checkpoint", TinyLlava())
    for name, model in (("demo", "demo"), ("random", str(checkpoint))):
        here("--model", model, "--output", str(bundles / name), "--overwrite", "--no-verify")


def here(*words: str) -> str:
    """What this machine's own `holov-export` printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return output_of([sys.executable, "-m", "holov_export", *words], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/aarch64", help="where everything is made")
    options = parser.parse_args()
    work = options.work.resolve()
    print(one_line())
    try:
        check_machine()
        work.mkdir(parents=True, exist_ok=True)
        root = unpack_guest(work)
        guest = Guest(root, install_wheels(work, root))
        print(guest.run("-c", VERSIONS).strip())
        export_bundles(work)
        same = compare(guest, work)
    except MissingError as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from error
    print("the tokens are the same" if same else "THE TOKENS DIFFER")
    raise SystemExit(0 if same else 1)


VERSIONS = """
import platform
from importlib.metadata import version
names = ("numpy", "onnxruntime", "onnxruntime-genai", "tokenizers", "holov-export")
print("there:", platform.machine(), "Python", platform.python_version(), *(f"{n} {version(n)}" for n in names))
"""


def compare(guest: Guest, work: Path) -> bool:
    """Ask everything on both and print a table; whether all tokens are the same."""
    table = Table("bundle", "tokens", "decoder", "answer", "equal", "s here", "s there", box=None)
    same = True
    for name, budgets in BUDGETS.items():
        for question in (Question(name, budget, decoder) for budget in budgets for decoder in DECODERS):
            words = question.words(work)
            began = time.perf_counter()
            mine = json.loads(here(*words))
            between = time.perf_counter()
            theirs = json.loads(guest.run("-m", "holov_export", *words))
            ended = time.perf_counter()
            wanted, found = mine["token_ids"], theirs["token_ids"]
            equal = wanted == found and mine["visual_tokens"] == theirs["visual_tokens"] == [question.budget]
            same = same and equal and bool(wanted)
            shared = sum(1 for a, b in zip(wanted, found, strict=False) if a == b)
            table.add_row(
                name,
                str(question.budget),
                question.decoder,
                repr(theirs["text"][:24]),
                f"{shared}/{len(wanted)}" + ("" if equal else " DIFFER"),
                f"{between - began:.1f}",
                f"{ended - between:.1f}",
            )
    Console(width=120).print(table)
    return same


if __name__ == "__main__":
    main()
