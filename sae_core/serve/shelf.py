"""The atlases that are served: opened when first asked for, and again when one of their stages was made anew."""

import threading
from typing import Annotated

from fastapi import Depends, Request

from sae_core.artifacts import MANIFEST, ArtifactError, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.names import DictionarySpec
from sae_core.stages import ON_DEMAND, VERSIONS, report_of

Stamp = tuple[int, ...]


class Shelf:
    """Open atlases. A request keeps the one that it was given, so that no page mixes an old with a new one."""

    def __init__(self, store: ArtifactStore, dictionary: str = "") -> None:
        self.store = store
        self._default = dictionary
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Stamp, Atlas]] = {}
        self._newest: tuple[Stamp, str] = (), ""

    def slugs(self) -> list[str]:
        """The dictionaries that have pages: those whose features are made."""
        return self.store.slugs("features")

    @property
    def default(self) -> str:
        """The dictionary that is meant when none is named. Raises ArtifactError when there is none yet."""
        if self._default:
            return self._default
        stamp = tuple(self._changed("features", slug) for slug in self.slugs())
        if self._newest[0] != stamp or not stamp:
            self._newest = stamp, Atlas.open(self.store).dictionary
        return self._newest[1]

    def atlas(self, dictionary: str = "") -> Atlas:
        """The atlas of a dictionary. Raises ArtifactError when there is no such one."""
        slug = dictionary or self.default
        if slug not in self.slugs():
            known = ", ".join(self.slugs()) or "none yet: `mind-atlas run` makes one"
            raise ArtifactError(f"no finished dictionary {slug!r}: finished are {known}")
        spec = DictionarySpec.parse(slug)
        stamp = tuple(self._changed(stage, slug_of(spec, stage)) for stage in VERSIONS)
        with self._lock:
            if self._open.get(slug, ((), None))[0] != stamp:
                self._open[slug] = stamp, Atlas.open(self.store, slug)
            return self._open[slug][1]

    @property
    def has_circuits(self) -> bool:
        """Whether some study's circuits were made."""
        return bool(self.store.slugs("circuit"))

    def reports(self, dictionary: str) -> set[str]:
        """What was made on request of a dictionary as it is now; nothing of one that is not there."""
        if dictionary not in self.slugs():
            return set()
        store = self.atlas(dictionary).store
        return {stage for stage in ON_DEMAND if report_of(store, stage, dictionary)}

    def _changed(self, stage: str, slug: str) -> int:
        """When the artifact was last made, in nanoseconds; 0 if never."""
        try:
            return (self.store.root / stage / slug / MANIFEST).stat().st_mtime_ns
        except OSError:
            return 0


def slug_of(spec: DictionarySpec, stage: str) -> str:
    """What the artifact of a stage is called that a dictionary is made from, or that is made from it."""
    return {"corpus": spec.site.corpus, "activations": spec.site.slug}.get(stage, spec.slug)


def chosen_atlas(request: Request, dictionary: str = "") -> Atlas:
    """The atlas that a request means by `dictionary`, in its path or its query."""
    shelf: Shelf = request.app.state.shelf
    return shelf.atlas(dictionary)


ChosenAtlas = Annotated[Atlas, Depends(chosen_atlas)]
