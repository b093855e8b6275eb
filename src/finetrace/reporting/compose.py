"""From results to the values of a report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetrace.attribution.method import written
from finetrace.evaluation.intervals import Estimate
from finetrace.examples import Example
from finetrace.reporting.payload import ExampleView, Interval, MethodView, ModelBehaviour, Report
from finetrace.tracing import TABLE, Result, opening
from finetrace.verdict import verdict


def compose(
    title: str,
    results: Sequence[Result],
    facts: Mapping[str, str],
    *,
    behaviour: Sequence[ModelBehaviour] = (),
    target: str | None = None,
    validated: str | None = None,
    covered: int | None = None,
) -> Report:
    """A page's values; it opens on the best method that is no control. `validated`: what retraining has said of the index.

    `covered`: how many top examples coverage looks at, where not as many as the class has.
    """
    scores = results[0].scores
    more: dict[str, Any] = {} if validated is None else {"validation": validated}
    counted = next((result.metrics["accuracy"].n for result in results if result.metrics), None)
    return Report(
        title=title,
        verdict=verdict(results, covered),
        facts=facts,
        train=[view(example) for example in scores.train],
        queries=[view(query) for query in scores.queries],
        methods=[_method(result) for result in results],
        default_method=opening(results).method.title,
        behaviour=behaviour,
        target_label=target,
        judged=counted,
        covered=covered,
        **more,
    )


def view(example: Example) -> ExampleView:
    """The texts of one example."""
    return ExampleView(example.id, example.label, example.prompt, example.response)


def interval(estimate: Estimate) -> Interval:
    """A page's interval."""
    return Interval(estimate.value, estimate.low, estimate.high)


def _method(result: Result) -> MethodView:
    method = result.method
    parameters = ", ".join(f"{key} {written(value)}" for key, value in result.scores.parameters.items())
    return MethodView(
        method=method.title,
        title=method.summary(),
        control=method.control,
        unit=result.scores.unit,
        metrics={name: interval(result.metrics[name]) for name in TABLE if name in result.metrics},
        seconds=result.scores.seconds,
        scores=result.scores.values,
        note=parameters,
    )
