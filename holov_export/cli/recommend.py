"""`holov-export recommend`: the smallest budget, and the rule, that keep the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from holov_export.cli.console import OUT, print_json, say
from holov_export.cli.evaluate import (
    Asked,
    asked_from_options,
    command_line,
    evaluated,
    print_tables,
    ready_to_ask,
    shared_options,
)
from holov_export.errors import CheckFailedError
from holov_export.evaluate.recommend import (
    latencies_of,
    recommendation_from,
    table_of,
    verdict_of,
    write_recommendation,
)
from holov_export.evaluate.report import JSON, evaluation_from_file


@click.command()
@shared_options
@click.option(
    "--retain",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.98,
    show_default=True,
    help="Share of the unpruned metric that must be kept, by the lower end of the 95 % interval.",
)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed runs of each cell.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=60, show_default=True, help="For all timed runs."
)
def recommend(as_json: bool, retain: float, rounds: int, seconds: float, **options: Any) -> None:
    """Find the smallest budget that keeps the answers.

    Asks what the journal in --output does not hold yet, as `evaluate` does, and times every rule at every budget on
    this machine. Among rules at the same budget the faster one is recommended. Exit code 1 if nothing keeps as much.
    """
    asked = _like_the_evaluation(asked_from_options({**options, "baseline": None}))
    ready = ready_to_ask(asked)
    report = evaluated(ready)
    say("  time the vision graph and the first token")
    question = ready.dataset.questions[0]
    measured = latencies_of(ready.bundle, ready.plan, ready.settings, question, rounds=rounds, seconds=seconds)
    found = recommendation_from(report, ready.plan, measured, retain, command=command_line())
    written = write_recommendation(found, asked.output)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_tables([table_of(found)])
        for remark in found.remarks:
            say(f"{remark}.")
    if found.chosen is None:
        raise CheckFailedError(
            verdict_of(found),
            hint="Try larger --budgets, other --methods, or more questions: few make wide intervals.",
        )
    if not as_json:
        OUT.print(verdict_of(found), soft_wrap=True)
        OUT.print(str(written), soft_wrap=True)


def _like_the_evaluation(asked: Asked) -> Asked:
    """With the rules and budgets of the evaluation in the output folder, where none are named."""
    path = asked.output / JSON
    if asked.overwrite or not path.is_file() or (asked.methods and asked.budgets):
        return asked
    earlier = evaluation_from_file(path)
    methods, budgets = asked.methods or earlier.methods, asked.budgets or earlier.sizes
    say(f"as in '{path}': {', '.join(methods)} at {', '.join(map(str, budgets))} tokens")
    return replace(asked, methods=methods, budgets=budgets)
