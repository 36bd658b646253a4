#!/usr/bin/env python3
"""Answers of a demo bundle as JSON on stdout, for comparisons between decoders and between Pythons.

    python scripts/demo_answers.py BUNDLE DECODER

Asks every question of the demo scenes at several budgets. Needs the runtime's packages and those of the decoder only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from holov_export import Session
from holov_export.assets import data_folder
from holov_export.tensors import SamplingSettings

BUDGETS = (1, 8, 16, 36, 144)
QUESTIONS = (
    "how many digits are there?",
    "which digit is at the bottom?",
    "is there a seven?",
    "what is left of the red digit?",
)


def main() -> None:
    bundle, decoder = Path(sys.argv[1]), sys.argv[2]
    greedy = SamplingSettings(max_new_tokens=24)
    found = []
    with Session.open(bundle, decoder=decoder, provider="cpu", threads=1) as session:
        for scene in sorted(data_folder("demo-scenes").glob("*.png")):
            for question in QUESTIONS:
                for budget in BUDGETS:
                    answer = session.ask(scene, question, budget=budget, sampling=greedy)
                    found.append([scene.name, question, budget, list(answer.token_ids), answer.text])
        print(json.dumps({"python": sys.version.split()[0], "name": session.name, "answers": found}))


if __name__ == "__main__":
    main()
