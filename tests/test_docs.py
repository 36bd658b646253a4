from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from holov_export.cli import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_documents_are_up_to_date() -> None:
    """docs/cli.md and the blocks of README.md say what the code and the benchmark results say."""
    check = [sys.executable, str(ROOT / "scripts" / "update_docs.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every `holov-export ...` line in a shell block."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").split("  ")[0].split(" > ")[0].split(" # ")[0].strip()
                if line.startswith("holov-export "):
                    found.append((path.relative_to(ROOT).as_posix(), line))
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_in_documents_parse(document: str, line: str) -> None:
    """Every command that a document shows exists, with every option and value that it shows."""
    arguments = shlex.split(line)[1:]
    with cli.make_context("holov-export", list(arguments)) as context:
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = cli.resolve_command(context, rest)
        assert command is not None
        command.make_context(name, rest, parent=context)
