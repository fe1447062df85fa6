"""The stages of an atlas and what each is made from: the one place that knows the shape of the pipeline.

    corpus -> activations -> dictionary -> features -> labels
                                       -> neighbors -> labels
                                       -> feature_map
                                       -> steering       and, of all together: atlas
    steering -> steering_report

A stage's version is raised when its code gives another result for the same settings.
"""

from collections.abc import Iterator
from typing import Any

from sae_core.artifacts import Recipe
from sae_core.catalog import identify_dictionary, identify_model, identify_text
from sae_core.settings import Settings
from sae_core.study import CorpusSettings, DictionarySettings, LabelSettings, ModelSettings, Study

VERSIONS = {
    "corpus": 1, "activations": 1, "dictionary": 2, "features": 2, "neighbors": 1, "feature_map": 1, "steering": 1,
    "labels": 3, "atlas": 1, "steering_report": 2,
}  # fmt: skip


def recipes(study: Study) -> Iterator[Recipe]:
    """Every artifact that the study asks for, parents first.

    Raises:
        MindAtlasError: a model or a source of text cannot be found.
    """
    model = identify_model(study.model)
    corpus = _recipe("corpus", study.corpus.name, _corpus_settings(study.corpus) | {"model": model})
    yield corpus
    activations = _recipe("activations", study.site.slug, _settings(study.activations) | {"model": model}, corpus)
    yield activations
    for dictionary in study.dictionaries:
        yield from _dictionary_recipes(study, dictionary, corpus, activations)


def _dictionary_recipes(
    study: Study, dictionary: DictionarySettings, corpus: Recipe, activations: Recipe
) -> Iterator[Recipe]:
    slug = study.spec(dictionary).slug
    trained = _recipe("dictionary", slug, _dictionary_settings(dictionary), corpus, activations)
    features = _recipe("features", slug, _settings(study.features), corpus, activations, trained)
    yield trained
    yield features
    neighbors = _recipe("neighbors", slug, _settings(study.neighbors), trained)
    feature_map = _recipe("feature_map", slug, _settings(study.feature_map), trained)
    steering = _recipe("steering", slug, _settings(study.steering), activations, trained, features)
    labels = _recipe("labels", slug, _label_settings(study.labels), features, neighbors)
    parts = (neighbors, feature_map, steering, labels)
    yield from parts
    yield _recipe("atlas", slug, {}, corpus, activations, trained, features, *parts)
    report = _settings(study.steering_report)
    yield _recipe("steering_report", slug, report, corpus, activations, trained, features, steering)


def _recipe(stage: str, slug: str, settings: dict[str, Any], *parents: Recipe) -> Recipe:
    return Recipe(stage, slug, VERSIONS[stage], settings, parents)


def _settings(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _dictionary_settings(dictionary: DictionarySettings) -> dict[str, Any]:
    """The dictionary's settings, with the content of one that is imported in place of where it lies."""
    source = {"source": identify_dictionary(dictionary.source)} if dictionary.source else {}
    return _settings(dictionary) | source


def _label_settings(labels: LabelSettings) -> dict[str, Any]:
    """The labels' settings but for the pace, with the content of a local model in place of where it lies.

    The budget is among them: labels that it cut short are others than those without it. To make them again costs
    nothing, as every answer is in the cache.
    """
    settings = labels.model_dump(mode="json", exclude={"concurrency", "timeout"})
    if labels.base_url or not labels.features:
        return settings
    return settings | {"model": identify_model(ModelSettings(source=labels.model))}


def _corpus_settings(corpus: CorpusSettings) -> dict[str, Any]:
    """The corpus's settings with each source's content in place of where it lies."""
    sources = [_settings(s) | {"source": identify_text(s)} for s in corpus.sources]
    return _settings(corpus) | {"sources": sources}
