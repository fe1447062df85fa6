"""The one resource: where things are kept, what the machine is, and how a stage is made with both."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import dagster as dg
from pydantic import Field, ValidationError, create_model

from assets.checks import result
from assets.partitions import STUDIES
from sae_core.artifacts import ATLAS, ArtifactError, ArtifactStore, Draft, Made, fingerprint_of, home
from sae_core.checks import Verdict, verdicts
from sae_core.errors import MindAtlasError
from sae_core.generations import collect, followed, served
from sae_core.progress import Report, now_and_then
from sae_core.settings import Settings
from sae_core.studies import Order
from sae_core.study import DictionarySettings
from sae_core.study_files import explain

if TYPE_CHECKING:
    from sae_core.activations.harvest import Plan, Pool

Build = Callable[[Order, Draft, Report], dict[str, Any]]
"""Calls the one function of `sae_core` that makes a draft, and returns its summary."""
LOG_SECONDS = 20.0
"""Seconds between two progress lines in Dagster's log, where a line costs a database row."""

STUDY_TAG = "mind_atlas/study"
"""Tag of a run that is made for a study, by the study's name; artifacts may be shared between studies."""

watchers: list[Callable[[str], Report]] = []
"""Who else wants to see progress; the command line puts its progress bar here."""


def launchpad(settings: type[Settings], *named: str) -> type[dg.Config]:
    """The run config of a stage: every setting, typed and described; one left empty is what the study says.

    A change made there gives an artifact that differs from its study, and `mind-atlas status` says how. The settings
    in `named` are left out: the partition's name says them.
    """
    fields: dict[str, Any] = {"again": (bool, Field(False, description="Make it again even when it is up to date."))}
    for name, field in settings.model_fields.items():
        annotation, choices = field.annotation, ""
        of = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        if get_origin(of) is Literal:  # Dagster has no optional choice, so say them in words
            choices, annotation = f" One of {', '.join(get_args(of))}.", str if of is annotation else list[str]
        if name not in named:
            text = f"{field.description or ''}{choices} Empty: what the study says."
            fields[name] = (annotation | None, Field(None, description=text))  # type: ignore[operator]
    return create_model(f"{settings.__name__.removesuffix('Settings')}Run", __base__=dg.Config, **fields)


class Workshop(dg.ConfigurableResource):
    """Where artifacts are kept, and the machine that makes them. No part of any fingerprint."""

    root: str = Field(
        default="", description="Folder of everything made. Empty: MIND_ATLAS_HOME, or `atlas` in the project."
    )
    device: str = Field(
        default="auto", description="`cpu`, `cuda`, `cuda:1`; `auto` takes a CUDA device when there is one."
    )
    api_key: str = Field(
        default="", description="The label writer's key, as an EnvVar. Empty: OPENAI_API_KEY. It is kept nowhere."
    )

    workers: int = Field(
        default=0, ge=0, description="Processes that read activations at once. 0: one for each GPU, or one on a CPU."
    )
    ray: str = Field(
        default="", description="Address of a Ray cluster whose workers read activations: `auto`, `ray://host:10001`."
    )
    activations: str = Field(
        default="",
        description="URL that takes the activations, as `s3://bucket/folder`. Empty: MIND_ATLAS_ACTIVATIONS, or root.",
    )

    @property
    def store(self) -> ArtifactStore:
        """The store that all stages read and write."""
        return ArtifactStore(Path(self.root) if self.root else home())

    def finished(self, draft: Draft) -> Path:
        """Folder of the artifact that a part is to be made again of.

        Raises:
            ArtifactError: there is none, it was made otherwise than the study has it now, or from what is not served.
        """
        seen = served(self.store, draft.recipe.slug)
        kept = (seen.manifest(made.manifest.stage, made.manifest.slug) for made in draft.parents.values())
        now = {manifest.fingerprint for manifest in kept if manifest}
        if any(made.manifest.fingerprint not in now for made in draft.parents.values()):
            raise ArtifactError(
                f"{draft.recipe.key} was made last for a retraining that is not served, and would not be seen: "
                "`mind-atlas status` says why. Loosen [retraining] or [checks] and run `mind-atlas run` to serve it, "
                "or take back what was changed and run that, to go on with the atlas that is served"
            )
        status = self.store.status(draft.recipe)
        if status.state != "made" or self.store.draft_folder(draft.recipe):  # the latter: its parents changed since
            why = status.why or "what it is made from changed"
            raise ArtifactError(f"{draft.recipe.key} is not up to date ({why}): run `mind-atlas run` first")
        return self.store.get(draft.recipe.stage, draft.recipe.slug).folder

    def torch_device(self) -> str:
        """The device to compute on."""
        from sae_core.devices import torch_device  # heavy: only a running step pays for it

        return torch_device(self.device)

    @contextmanager
    def pool(self) -> Iterator["Pool | None"]:
        """Those who read activations beside this process, while the `with` lasts; None when there is nobody."""
        from sae_core.activations import parallel  # torch

        device = self.torch_device()
        if self.ray:
            with _cluster(self.ray).yield_for_execution(dg.build_init_resource_context()):
                yield parallel.on_ray(self.workers, device)
        else:
            devices = parallel.devices(device, self.workers)
            yield parallel.processes(devices) if len(devices) > 1 else None

    def elsewhere(self, draft: Draft) -> str:
        """URL that takes a draft's activations; empty when they stay in its folder."""
        return self._elsewhere(draft.recipe.slug, draft.folder)

    def _elsewhere(self, slug: str, folder: Path) -> str:
        url = (self.activations or os.environ.get("MIND_ATLAS_ACTIVATIONS", "")).rstrip("/")
        return f"{url}/{slug}/{folder.name}" if url else ""

    def make(
        self,
        context: dg.AssetExecutionContext,
        section: str,
        config: dg.Config,
        build: Build,
        describe: Callable[[Made], dict[str, Any]] = lambda made: {},
    ) -> dg.MaterializeResult:
        """Make the running asset's partition by `build`, unless it is there, and say what there is now.

        Args:
            context: the running step; asset and partition name the artifact.
            section: the study's section that the asset's run config may change.
            config: the run config, as `launchpad` made it.
            build: makes what is not there.
            describe: metadata beyond the summary's numbers: tables and pictures.

        Raises:
            dagster.Failure: with one line that a user can act on; tried again only where nothing is to be mended.
        """
        from sae_core.atlas import write_views  # brings DuckDB, which only a running step needs

        stage, slug = context.asset_key.path[-1], context.partition_key
        asked = config.model_dump()
        again = bool(asked.pop("again") or asked.pop("only", None))  # a part is made again by copying the rest
        changes = {k: v for k, v in asked.items() if v is not None}
        report = _reporter(context, stage)
        try:
            order = STUDIES.order(slug, context.run.tags.get(STUDY_TAG)).override(section, changes)
            recipe = order.recipe(stage, slug)
            with self.store.lock():  # one heavy step at a time, and nobody makes its parents anew meanwhile
                made = self.store.make(recipe, lambda draft: build(order, draft, report), again=again)
                if stage == ATLAS:
                    collect(self.store, order.study.retraining.generations)
        except ValidationError as error:
            raise dg.Failure(f"{section}: {explain(error)}", allow_retries=False) from error
        except MindAtlasError as error:
            raise dg.Failure(str(error), allow_retries=error.passing) from error
        write_views(self.store)
        context.log.info(f"{stage} {slug}: {'cached' if made.cached else f'made in {made.manifest.seconds:.0f} s'}")
        return dg.MaterializeResult(
            metadata={**describe(made), **_metadata(made)},  # pictures and tables first
            data_version=dg.DataVersion(made.manifest.fingerprint),
            check_results=[result(verdict) for verdict in verdicts(stage, made.manifest.summary, order)],
        )

    def others(self, context: dg.AssetExecutionContext, order: Order) -> dict[Path, DictionarySettings]:
        """The study's other dictionaries that are still to be made, by the folder where they will be.

        There are none when the run is for one dictionary alone, and not for a study as it is.
        """
        found = {}
        for settings in order.study.dictionaries if STUDY_TAG in context.run.tags else []:
            recipe = order.recipe("dictionary", order.study.spec(settings).slug)
            folder = self.store.draft_folder(recipe)
            if settings != order.dictionary and folder and not self.previous(recipe.slug, fingerprint_of(folder)):
                found[folder] = settings
        return found

    def other_sites(self, context: dg.AssetExecutionContext, order: Order) -> "list[Plan]":
        """What the study wants of other sites, and has not yet, when the run is for a study as it is.

        Only what is read alike: one pass of the model gives them all.
        """
        from sae_core.activations.harvest import Plan

        found: list[Plan] = []
        if STUDY_TAG not in context.run.tags:
            return found
        study = STUDIES.get(context.run.tags[STUDY_TAG])
        for site in study.all_sites:
            if site.at(order.study.activations.hook, order.study.activations.layer) != order.study.activations:
                continue
            recipe = Order(study.at(site), None).recipe("activations", study.named(site).slug)
            folder = self.store.draft_folder(recipe)
            if folder and site != order.study.activations:
                corpus = self.store.get("corpus", study.corpus.name).folder
                found.append(Plan(site, study.model, corpus, folder, self._elsewhere(recipe.slug, folder)))
        return found

    def previous(self, slug: str, fingerprint: str) -> Path | None:
        """Folder of the served dictionary that the one with this fingerprint follows; such a one is trained alone."""
        generation = followed(self.store, slug, fingerprint)
        named = generation.manifests[f"dictionary/{slug}"].folder if generation else ""
        return self.store.root / "dictionary" / slug / named if named else None

    def verdicts(self, order: Order, parents: dict[str, Made]) -> list[Verdict]:
        """The checks of all stages."""
        manifests = [made.manifest for made in parents.values()]
        return [v for manifest in manifests for v in verdicts(manifest.stage, manifest.summary, order)]


def _cluster(address: str) -> Any:
    try:
        from assets.cluster import Cluster
    except ImportError:
        raise MindAtlasError(f'ray = {address} needs Ray: pip install "mind-atlas[ray]", or leave it empty') from None
    return Cluster(address=address)


def _metadata(made: Made) -> dict[str, Any]:
    """The summary's numbers, where the artifact lies, and what it was made with."""
    return {
        **{k: _rounded(v) for k, v in made.manifest.summary.items() if isinstance(v, bool | int | float | str)},
        "cached": made.cached,
        "seconds_to_make": made.manifest.seconds,
        "folder": dg.MetadataValue.path(str(made.folder)),
        "settings": dg.MetadataValue.json(made.manifest.settings),
    }


def _rounded(value: bool | int | float | str) -> bool | int | float | str:
    """Six digits are enough to look at; the manifest has them all."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _reporter(context: dg.AssetExecutionContext, stage: str) -> Report:
    """Progress for the log now and then, and for every watcher at once."""
    reports = [now_and_then(context.log.info, LOG_SECONDS), *(watch(stage) for watch in watchers)]

    def report(done: int, total: int, unit: str, **values: float) -> None:
        for one in reports:
            one(done, total, unit, **values)

    return report
