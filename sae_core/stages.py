"""The stages of an atlas and what each is made from: the one place that knows the shape of the pipeline.

    corpus -> activations -> dictionary -> features -> labels
                                       -> neighbors -> labels
                                       -> feature_map
                                       -> steering       and, of all together: atlas
    steering, labels -> steering_report

and, when they are asked for, the reports `safety` (of features and steering), `behaviors` (of the features that it
found) and `multilingual`; of a site, `scaling` and `science`.

The first dictionaries of all sites of a study together make `circuit`, one for each task that the study names.

A stage's version is raised when its code gives another result for the same settings.
"""

from collections.abc import Iterator
from typing import Any

from sae_core.artifacts import ArtifactStore, Made, Recipe
from sae_core.catalog import identify_dictionary, identify_embedder, identify_model, identify_text
from sae_core.names import Site
from sae_core.settings import Settings
from sae_core.study import BehaviorSettings, CorpusSettings, DictionarySettings, LabelSettings, ModelSettings, Study

VERSIONS = {
    "corpus": 1, "activations": 1, "dictionary": 2, "features": 2, "neighbors": 1, "feature_map": 2, "steering": 1,
    "labels": 7, "atlas": 1,
}  # fmt: skip

ON_DEMAND = {"steering_report": 4, "safety": 2, "multilingual": 2, "behaviors": 1, "scaling": 1, "science": 2}
"""Versions of the stages that are no part of an atlas, and made when somebody asks for them."""

SITE_REPORTS = ("scaling", "science")
"""Those of them that belong to a site, and not to one of its dictionaries; each after what it reads."""

PER_STUDY = {"circuit": 1}
"""Versions of the stages that are made of several dictionaries of a study, when the study asks for them."""


def recipes(study: Study, on_demand: bool = False) -> Iterator[Recipe]:
    """Every artifact that the study asks for, parents first; with `on_demand`, also those that wait to be asked for.

    Raises:
        MindAtlasError: a model or a source of text cannot be found.
    """
    model = identify_model(study.model)
    corpus = _recipe("corpus", study.corpus.name, _corpus_settings(study.corpus) | {"model": model})
    yield corpus
    sites = {
        study.named(site): _recipe("activations", study.named(site).slug, _settings(site) | {"model": model}, corpus)
        for site in study.all_sites
    }
    yield from sites.values()
    trained: dict[str, Recipe] = {}
    if on_demand:
        for one in map(study.at, study.sites):
            settings = _settings(one.scaling) | {"dictionary": _settings(one.dictionaries[0])}
            scaling = _recipe("scaling", one.site.slug, settings, sites[one.site])
            yield scaling
            yield _recipe("science", one.site.slug, _science_settings(one), corpus, sites[one.site], scaling)
    for one, dictionary in study.trainings:
        written = one.written(dictionary)
        read, also = sites[one.site], [sites[one.named(written)]] if written else []
        for recipe in _dictionary_recipes(one, dictionary, corpus, read, also, on_demand):
            trained |= {recipe.slug: recipe} if recipe.stage == "dictionary" else {}
            yield recipe
    yield from _circuit_recipes(study, sites, trained)


def report_of(store: ArtifactStore, stage: str, slug: str) -> Made | None:
    """What was made on demand, of a kind that this version of the program reads; None when there is no such."""
    manifest = store.manifest(stage, slug)
    return store.get(stage, slug) if manifest and manifest.version == ON_DEMAND[stage] else None


def _dictionary_recipes(
    study: Study,
    dictionary: DictionarySettings,
    corpus: Recipe,
    activations: Recipe,
    written: list[Recipe],
    on_demand: bool,
) -> Iterator[Recipe]:
    """A dictionary and all that follows; `written` is what a transcoder writes, if it is one."""
    slug = study.spec(dictionary).slug
    trained = _recipe("dictionary", slug, _dictionary_settings(dictionary), corpus, activations, *written)
    features = _recipe("features", slug, _settings(study.features), corpus, activations, trained)
    yield trained
    yield features
    neighbors = _recipe("neighbors", slug, _settings(study.neighbors), trained)
    feature_map = _recipe("feature_map", slug, _settings(study.feature_map), trained)
    steering = _recipe("steering", slug, _settings(study.steering), activations, trained, features)
    labels = _recipe("labels", slug, _label_settings(study.labels), features, neighbors)
    parts = (neighbors, feature_map, steering, labels)
    yield from parts
    yield _recipe("atlas", slug, {}, corpus, activations, *written, trained, features, *parts)
    if on_demand:
        report = _settings(study.steering_report)
        yield _recipe("steering_report", slug, report, corpus, activations, trained, features, steering, labels)
        parents = (corpus, activations, trained, features)
        safety = _recipe("safety", slug, _safety_settings(study), *parents, steering)
        yield safety
        yield _recipe("behaviors", slug, _behavior_settings(study.behaviors), activations, trained, features, safety)
        yield _recipe("multilingual", slug, _settings(study.multilingual), *parents)


def _circuit_recipes(study: Study, sites: dict[Site, Recipe], trained: dict[str, Recipe]) -> Iterator[Recipe]:
    """The circuits of the study's tasks, each with its task's content."""
    if not study.circuits.tasks:
        return
    from sae_core.circuits.tasks import tasks_of

    parents: list[Recipe] = []
    for one, dictionary in study.first_trainings:
        parents += [sites[one.site], trained[one.spec(dictionary).slug]]
    for task in tasks_of(study.circuits):
        settings = _settings(study.circuits) | {"tasks": [], "folder": "", "task": _settings(task)}
        yield _recipe("circuit", study.circuit_slug(task.name), settings, *parents)


def _recipe(stage: str, slug: str, settings: dict[str, Any], *parents: Recipe) -> Recipe:
    return Recipe(stage, slug, (VERSIONS | ON_DEMAND | PER_STUDY)[stage], settings, parents)


def _settings(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _dictionary_settings(dictionary: DictionarySettings) -> dict[str, Any]:
    """The dictionary's settings, with the content of one that is imported in place of where it lies."""
    source = {"source": identify_dictionary(dictionary.source)} if dictionary.source else {}
    return _settings(dictionary) | source


def _label_settings(labels: LabelSettings) -> dict[str, Any]:
    """The labels' settings but for the pace, with the content of local models in place of where they lie.

    The budget is among them: labels that it cut short are others than those without it. To make them again costs
    nothing, as every answer is in the cache.
    """
    settings = labels.model_dump(mode="json", exclude={"concurrency", "timeout"})
    if not labels.features:
        return settings
    settings["embedder"] = identify_embedder(labels.embedder)
    if labels.base_url:
        return settings
    return settings | {"model": identify_model(ModelSettings(source=labels.model), "labels.model")}


def _science_settings(study: Study) -> dict[str, Any]:
    """The settings, with who is asked where a judge is wanted."""
    return _settings(study.science) | ({"labels": _label_settings(study.labels)} if study.science.judged else {})


def _safety_settings(study: Study) -> dict[str, Any]:
    """The audit's settings, with the content of each concept in place of its name."""
    from sae_core.safety.concepts import concepts_of

    return _settings(study.safety) | {"folder": "", "concepts": {c.name: c.identity for c in concepts_of(study.safety)}}


def _behavior_settings(settings: BehaviorSettings) -> dict[str, Any]:
    """The settings, with the content of each behavior."""
    from sae_core.safety.behaviors import load_behaviors

    return _settings(settings) | {"behaviors": {b.name: b.identity for b in load_behaviors()}}


def _corpus_settings(corpus: CorpusSettings) -> dict[str, Any]:
    """The corpus's settings with each source's content in place of where it lies."""
    sources = [_settings(s) | {"source": identify_text(s)} for s in corpus.sources]
    return _settings(corpus) | {"sources": sources}
