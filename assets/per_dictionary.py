"""The one shape of most stages: made for a dictionary, from what came before, by one function of `sae_core`."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from assets.checks import specs
from assets.partitions import dictionaries
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Draft, Made
from sae_core.progress import Report
from sae_core.settings import Settings
from sae_core.stages import ON_DEMAND, VERSIONS
from sae_core.studies import Order
from sae_core.study import Study

if TYPE_CHECKING:
    from sae_core.steering_texts import Subject

REPORTS = "reports"
"""The group of what is made on demand."""


class Task(NamedTuple):
    """What a stage's function gets."""

    order: Order
    draft: Draft
    report: Report
    workshop: Workshop

    @property
    def study(self) -> Study:
        return self.order.study

    @property
    def slug(self) -> str:
        """Of the dictionary."""
        return self.draft.recipe.slug

    def subject(self) -> "Subject":
        """The model in float32, and the dictionary that steers it, for stages that read activations and features."""
        from sae_core.atlas import sink_norm
        from sae_core.language_model import LanguageModel
        from sae_core.steering_texts import Subject

        study, parents = self.study, self.draft.parents
        lm = LanguageModel.load(study.model, self.workshop.torch_device(), "float32")
        made, bound = (parents["dictionary"].folder, parents["features"].folder), sink_norm(parents["activations"])
        return Subject.open(lm, study.site, *made, bound)


def per_dictionary(
    settings: type[Settings],
    reads: Iterable[dg.AssetsDefinition | dg.AssetDep],
    group: str,
    kinds: set[str],
    describe: Callable[[Made], dict[str, Any]] = lambda made: {},
) -> Callable[[Callable[[Task], dict[str, Any]]], dg.AssetsDefinition]:
    """Make an asset of a function that fills a draft and returns its summary.

    The function's name is the stage's, and its section's in a study; its docstring is what Dagster shows.

    Args:
        settings: of the section; they are the run config.
        reads: the assets that it is made from.
        group: of Dagster's pages.
        kinds: tags that Dagster shows.
        describe: metadata beyond the summary's numbers.
    """

    def decorate(build: Callable[[Task], dict[str, Any]]) -> dg.AssetsDefinition:
        stage, run = build.__name__, launchpad(settings)

        @dg.asset(
            name=stage, description=build.__doc__, partitions_def=dictionaries, deps=reads, group_name=group,
            kinds=kinds, code_version=str((VERSIONS | ON_DEMAND)[stage]), check_specs=specs(stage),
        )  # fmt: skip
        def made(context: dg.AssetExecutionContext, config: run, workshop: Workshop) -> dg.MaterializeResult:
            return workshop.make(
                context, stage, config,
                lambda order, draft, report: build(Task(order, draft, report, workshop)), describe,
            )  # fmt: skip

        return made

    return decorate


def markdown(made: Made) -> dict[str, Any]:
    """A report's Markdown, as metadata."""
    return {"report": dg.MetadataValue.md(next(made.folder.glob("*.md")).read_text("utf-8"))}
