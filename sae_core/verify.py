"""Every byte of finished artifacts against the checksums in their manifests."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sae_core.artifacts import ArtifactError, ArtifactStore, Manifest
from sae_core.progress import Report, silent
from sae_core.stages import ON_DEMAND, PER_STUDY, VERSIONS


class Verdict(NamedTuple):
    """How an artifact was found."""

    artifact: str
    """Its key: stage and slug."""
    files: int
    gigabytes: float
    damage: dict[str, str]
    """What is wrong, by the file to make again."""


def verify(
    store: ArtifactStore, keys: Sequence[str] = (), *, repair: bool = False, report: Report = silent
) -> Iterator[Verdict]:
    """Read finished artifacts to the last byte, activations that lie elsewhere too.

    Args:
        store: where they are.
        keys: which ones; all when there are none. One that was never made is passed over.
        repair: remove the damaged files, so that the next run makes these again (of activations the damaged shards
            alone, of other stages the artifact), and readers do not take them for sound.
        report: told of bytes, after each artifact.

    Yields:
        A verdict on each.
    """
    wanted = keys or [f"{stage}/{slug}" for stage in VERSIONS | ON_DEMAND | PER_STUDY for slug in store.slugs(stage)]
    manifests = []
    for key in wanted:
        stage, _, slug = key.partition("/")
        try:
            manifests.append((key, store.manifest(stage, slug)))
        except ArtifactError as error:
            if repair:
                store.forget(stage, slug)
            yield Verdict(key, 0, 0.0, {"manifest.json": str(error)})
    found = [(key, manifest) for key, manifest in manifests if manifest]
    found += _kept(store, found, wanted)
    total, done = sum(_bytes(manifest) for _, manifest in found), 0
    for key, manifest in found:
        damage = store.damage(manifest, full=True)
        if manifest.stage == "activations":
            damage |= _damage_elsewhere(store, manifest, set(damage))
        if repair and damage:
            store.remove(manifest, damage)
        done += _bytes(manifest)
        report(done, total, "bytes")
        yield Verdict(key, len(manifest.files), _bytes(manifest) / 1e9, damage)


def _kept(
    store: ArtifactStore, newest: Sequence[tuple[str, Manifest]], keys: Sequence[str]
) -> list[tuple[str, Manifest]]:
    """What generations keep of the wanted artifacts beside the newest of each; of activations nothing is kept."""
    known = {(key, manifest.folder) for key, manifest in newest}
    parts = [Manifest(**said) for of in store.generations().values() for said in of.values()]
    kept = {(m.key, m.folder): m for m in parts if m.stage != "activations" and m.key in keys}
    return [(f"{key} ({folder})", m) for (key, folder), m in kept.items() if (key, folder) not in known]


def _bytes(manifest: Manifest) -> int:
    return sum(file["bytes"] for file in manifest.files.values())


def _damage_elsewhere(store: ArtifactStore, manifest: Manifest, known: set[str]) -> dict[str, str]:
    """Of activations that lie elsewhere: shards whose part there is not what was uploaded."""
    from sae_core.activations.elsewhere import ELSEWHERE, damage  # torch, which nothing else here needs

    if ELSEWHERE not in manifest.files or ELSEWHERE in known:
        return {}
    folder = store.get(manifest.stage, manifest.slug).folder
    return damage(folder, [name for name in manifest.files if name not in known])
