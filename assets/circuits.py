"""Circuit: the features of several layers that a task rests on, and which of them make which."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.dictionary import dictionary
from assets.partitions import circuits, dictionaries_of_circuit, sites_of_circuit
from assets.per_dictionary import markdown
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Draft
from sae_core.progress import Report
from sae_core.stages import PER_STUDY
from sae_core.studies import Order
from sae_core.study import CircuitSettings

CircuitRun = launchpad(CircuitSettings, "tasks", "folder")


@dg.asset(
    partitions_def=circuits,
    deps=[
        dg.AssetDep(activations, partition_mapping=sites_of_circuit),
        dg.AssetDep(dictionary, partition_mapping=dictionaries_of_circuit),
    ],
    group_name="circuits",
    kinds={"pytorch", "parquet"},
    code_version=str(PER_STUDY["circuit"]),
    check_specs=specs("circuit"),
)
def circuit(context: dg.AssetExecutionContext, config: CircuitRun, workshop: Workshop) -> dg.MaterializeResult:
    """Features and errors of all dictionaries by their effect on a task, edges between them, and how faithful it is."""

    def build(order: Order, draft: Draft, report: Report) -> dict[str, Any]:
        from sae_core.circuits.build import build_circuit
        from sae_core.circuits.network import Network, places_of
        from sae_core.circuits.tasks import tasks_of
        from sae_core.language_model import LanguageModel

        study, slug = order.study, draft.recipe.slug
        task = next(task for task in tasks_of(study.circuits) if study.circuit_slug(task.name) == slug)
        lm = LanguageModel.load(study.model, workshop.torch_device(), "float32")
        network = Network(lm, places_of(workshop.store, study, lm.device))
        return build_circuit(study.circuits, slug, task, network, draft.folder, report)

    return workshop.make(context, "circuits", config, build, markdown)
