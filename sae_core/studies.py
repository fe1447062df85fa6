"""All studies one knows of, and the way from an artifact's name back to the study that wants it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sae_core.artifacts import PROJECT, Recipe, home
from sae_core.settings import Settings
from sae_core.stages import recipes
from sae_core.study import ActivationSettings, DictionarySettings, Study
from sae_core.study_files import StudyError, load_study


def study_folders() -> tuple[Path, Path]:
    """Where study files lie: the shipped ones, and the user's (or links to them)."""
    return PROJECT / "pipelines" / "studies", home() / "studies"


class Order(NamedTuple):
    """An artifact somebody asks for: the study that describes it, and which of its dictionaries, if it is one's.

    The study is that of the artifact's one site, where it has one.
    """

    study: Study
    dictionary: DictionarySettings | None

    @property
    def trained(self) -> DictionarySettings:
        """The dictionary's settings, for the stages that belong to one."""
        assert self.dictionary is not None, "a corpus and a site belong to no one dictionary"
        return self.dictionary

    def settings(self, section: str) -> Settings:
        """The study's settings of one section, named as in the study file."""
        if section == "dictionary":
            return self.trained
        return getattr(self.study, section)

    def override(self, section: str, changes: dict[str, object]) -> "Order":
        """The same order with some settings of a section changed; names stay, fingerprints do not."""
        if not changes:
            return self
        old = self.settings(section)
        new = type(old).model_validate(old.model_dump() | changes)
        if isinstance(new, DictionarySettings):
            return Order(self.study.model_copy(update={"dictionaries": [new]}), new)
        if isinstance(new, ActivationSettings):
            return Order(self.study.at(new), self.dictionary)
        return Order(self.study.model_copy(update={section: new}), self.dictionary)

    def recipe(self, stage: str, slug: str) -> Recipe:
        """What the artifact is made from."""
        return next(r for r in recipes(self.study, on_demand=True) if r.stage == stage and r.slug == slug)


class Studies:
    """Studies by name, and the artifacts they ask for."""

    def __init__(self, studies: Iterable[Study]) -> None:
        self.by_name: dict[str, Study] = {}
        self.corpora: dict[str, Order] = {}
        self.sites: dict[str, Order] = {}
        self.dictionaries: dict[str, Order] = {}
        self.circuits: dict[str, Order] = {}
        for study in studies:
            self._add(study)

    @classmethod
    def load(cls, *folders: Path) -> "Studies":
        """Every `*.toml` of the folders; a link is followed, and one that leads nowhere is passed over.

        Raises:
            StudyError: a file is no valid study, or two studies want different things under one name.
        """
        files = (file.resolve() for folder in folders for file in sorted(folder.glob("*.toml")))
        return cls(load_study(file) for file in files if file.is_file())

    def __iter__(self) -> Iterator[Study]:
        return iter(self.by_name.values())

    def get(self, name: str) -> Study:
        """The study of that name. Raises StudyError, listing the known ones."""
        if name not in self.by_name:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise StudyError(f"no study {name!r}: known are {known}; or give the path of a .toml file")
        return self.by_name[name]

    def order(self, slug: str, study: str | None = None) -> Order:
        """The order behind an artifact's name: the named study's, or the first that asks for it.

        Raises StudyError when no study asks for it.
        """
        orders = orders_of(self.get(study)) if study else self._tables
        for table in orders:
            if slug in table:
                return table[slug]
        raise StudyError(f"no study asks for {slug}: add its study file again, and reload Dagster's code location")

    def site_of(self, dictionary: str) -> str:
        """Slug of the site that a dictionary reads."""
        return self.dictionaries[dictionary].study.site.slug

    def sites_of(self, dictionary: str) -> set[str]:
        """Slugs of the sites that a dictionary is trained on: a transcoder writes another than it reads."""
        order = self.dictionaries[dictionary]
        written = order.study.written(order.trained)
        return {order.study.site.slug} | ({order.study.named(written).slug} if written else set())

    def dictionaries_of(self, circuit: str) -> set[str]:
        """Slugs of the dictionaries that a circuit is made of."""
        return {one.spec(dictionary).slug for one, dictionary in self.circuits[circuit].study.first_trainings}

    def corpus_of(self, site: str) -> str:
        """Name of the corpus that a site is read over."""
        return self.sites[site].study.corpus.name

    @property
    def _tables(self) -> tuple[dict[str, Order], ...]:
        return self.corpora, self.sites, self.dictionaries, self.circuits

    def _add(self, study: Study) -> None:
        if study.name in self.by_name:
            raise StudyError(f"two study files are called {study.name}: rename one")
        self.by_name[study.name] = study
        after = (
            "features",
            "neighbors",
            "feature_map",
            "labels",
            "steering",
            "steering_report",
            "safety",
            "behaviors",
            "multilingual",
        )
        sections = ("model", "corpus"), ("model", "corpus", "activations"), ("dictionary", *after), ("circuits",)
        for table, orders, named in zip(self._tables, orders_of(study), sections, strict=True):
            for slug, order in orders.items():
                _enter(table, slug, order, *named)


class Orders(NamedTuple):
    """What a study asks for, by slug."""

    corpora: dict[str, Order]
    sites: dict[str, Order]
    dictionaries: dict[str, Order]
    circuits: dict[str, Order]


def orders_of(study: Study) -> Orders:
    """Every artifact of the study, and the study as it is at the artifact's site."""
    return Orders(
        {study.corpus.name: Order(study, None)},
        {study.named(site).slug: Order(study.at(site), None) for site in study.all_sites},
        {one.spec(dictionary).slug: Order(one, dictionary) for one, dictionary in study.trainings},
        {study.circuit_slug(task): Order(study, None) for task in study.circuits.tasks},
    )


def _enter(table: dict[str, Order], slug: str, order: Order, *sections: str) -> None:
    """Enter an order under its name, unless another study means something else by that name."""
    other = table.setdefault(slug, order)
    for section in sections:
        if other.settings(section) != order.settings(section):
            raise StudyError(
                f"studies {other.study.name} and {order.study.name} both make {slug}, but with another [{section}]: "
                "make the sections equal, or give one study a corpus `name` or a dictionary `variant` of its own"
            )


def adopt(file: Path) -> str:
    """Link a study file into the home folder, so that Dagster's UI knows it too, and return the study's name.

    Raises:
        StudyError: the file is no study, its name is another's, or it does not go together with those that are known;
            it is not linked then.
    """
    path = file.expanduser().resolve()
    own = load_study(path)
    files = {file.stem: file.resolve() for folder in study_folders() for file in folder.glob("*.toml")}
    if files.get(own.name, path) != path and files[own.name].is_file():
        raise StudyError(f"another study is called {own.name} ({files[own.name]}): rename {path.name}")
    Studies([*(s for s in Studies.load(*study_folders()) if s.name != own.name), own])  # do they go together?
    link = home() / "studies" / f"{own.name}.toml"
    if files.get(own.name) != path:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # it leads nowhere
        link.symlink_to(path)
    return own.name
