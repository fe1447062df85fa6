from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.checks import verdicts
from sae_core.studies import Order, Studies
from sae_core.study import DictionarySettings, DictionarySpec, Site, Study, StudyError

SHIPPED = Path(__file__).parents[2] / "pipelines" / "studies"
MINIMAL = """
[model]
source = "smollm2-135m-instruct"
[corpus]
sources = ["wiki-en"]
[activations]
layer = 15
"""

PLAIN = st.from_regex(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?", fullmatch=True)
MODEL = st.lists(PLAIN, min_size=1, max_size=3).map(".".join)
SITES = st.builds(Site, MODEL, st.sampled_from(["resid_pre", "mlp_out"]), st.integers(0, 200), PLAIN)

VARIANTS = st.from_regex(r"[a-z0-9-]*", fullmatch=True)


def study(tmp_path: Path, text: str, name: str = "mine.toml") -> Study:
    (tmp_path / name).write_text(text, "utf-8")
    return Study.load(tmp_path / name)


@given(SITES)
def test_a_site_is_its_slug_and_back(site: Site):
    assert Site.parse(site.slug) == site


@given(SITES, st.integers(1), st.integers(1), st.floats(0, exclude_min=True, allow_infinity=False), VARIANTS)
def test_a_dictionary_is_its_slug_and_back(site: Site, d_sae: int, k: int, l1_coefficient: float, variant: str):
    for spec in (
        DictionarySpec(site, "batch_top_k", d_sae, k, variant=variant),
        DictionarySpec(site, "relu", d_sae, l1_coefficient=l1_coefficient, variant=variant),
    ):
        assert DictionarySpec.parse(spec.slug) == spec


def test_slugs_read_as_the_design_says(tmp_path: Path):
    quick = study(tmp_path, MINIMAL, "quickstart.toml")
    assert quick.site.slug == "smollm2-135m-instruct.resid_post.L15.quickstart"
    assert quick.spec(quick.dictionaries[0]).slug == f"{quick.site.slug}.batch_top_k.w4096.k32"


def test_what_has_no_k_is_named_by_its_penalty(tmp_path: Path):
    paper = study(tmp_path, MINIMAL + '[dictionary]\narchitecture = "relu"\nl1_coefficient = [5, 0.5]')
    assert [d.k for d in paper.dictionaries] == [None, None]
    ends = [paper.spec(d).slug.removeprefix(paper.site.slug) for d in paper.dictionaries]
    assert ends == [".relu.w4096.l5", ".relu.w4096.l0_5"]


def test_the_one_setting_of_sparsity_has_a_default_and_the_other_is_in_no_fingerprint():
    by_k, by_penalty = DictionarySettings(), DictionarySettings(architecture="relu")
    assert (by_k.k, by_penalty.l1_coefficient) == (32, 5)
    assert "l1_coefficient" not in by_k.model_dump()
    assert "k" not in by_penalty.model_dump()
    assert DictionarySettings.model_validate(by_penalty.model_dump()) == by_penalty


@pytest.mark.parametrize("slug", ["", "a", "a.b.c.d", "m.resid_post.15.c", "m.resid_post.L15."])
def test_what_is_no_slug_is_refused(slug: str):
    with pytest.raises(StudyError, match="expected"):
        Site.parse(slug)
    with pytest.raises(StudyError, match="expected"):
        DictionarySpec.parse(slug)


def test_lists_in_the_dictionary_table_make_a_sweep(tmp_path: Path):
    sweep = study(tmp_path, MINIMAL + "[dictionary]\nd_sae = [1024, 4096]\nk = [16, 32, 64]\nseed = 1")
    assert [(d.d_sae, d.k) for d in sweep.dictionaries] == [(w, k) for w in (1024, 4096) for k in (16, 32, 64)]
    assert {d.seed for d in sweep.dictionaries} == {1}


def test_relative_paths_are_seen_from_the_study_file(tmp_path: Path):
    text = MINIMAL.replace('"wiki-en"', '"./texts", {source = "../more.jsonl", weight = 2}')
    sources = study(tmp_path, text).corpus.sources
    assert [s.source for s in sources] == [str(tmp_path / "texts"), str(tmp_path.parent / "more.jsonl")]
    assert sources[1].weight == 2


@pytest.mark.parametrize("value", ['"./sae"', '["./sae"]'])
def test_the_folder_of_an_imported_dictionary_is_seen_from_the_study_file(tmp_path: Path, value: str):
    (imported,) = study(tmp_path, MINIMAL + f"[dictionary]\nsource = {value}").dictionaries
    assert imported.source == str(tmp_path / "sae")


def test_a_dictionary_that_is_trained_has_no_source_in_its_fingerprint():
    assert "source" not in DictionarySettings().model_dump()
    imported = DictionarySettings(source="/sae")
    assert DictionarySettings.model_validate(imported.model_dump()) == imported


def test_hub_ids_and_hub_models_are_left_as_they_are(tmp_path: Path):
    text = MINIMAL.replace("smollm2-135m-instruct", "EleutherAI/pythia-70m").replace("wiki-en", "hf:org/data")
    mine = study(tmp_path, text)
    assert mine.model.slug == "pythia-70m"
    assert mine.corpus.sources[0].source == "hf:org/data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[dictionary]\nwidth = 3", "dictionary.width: unknown key; known here: .*d_sae"),
        ("[labels]\nmodle = 'x'", "labels.modle: unknown key; known here: .*model"),
        ("[corpse]\nx = 1", "corpse: unknown key; known here: .*corpus"),
        ("[dictionary]\nk = 0", "dictionary.k = 0: .*greater than or equal to 1"),
        ("[dictionary]\nk = 99\nd_sae = 64", "k = 99 is more than d_sae = 64: give"),
        ("[dictionary]\narchitecture = 'relu'\nk = 3", "k = 3 is no setting of relu: give l1_coefficient"),
        ("[dictionary]\nl1_coefficient = 3", "l1_coefficient = 3 is no setting of batch_top_k: give k"),
        ("[dictionary]\nk = 'many'", "dictionary.k = 'many': .*integer"),
        ("[dictionary]\nk = []", "dictionary.k: the list is empty"),
        ("[dictionary]\nlr_warmup = 0.9\nlr_decay = 0.9", "must not overlap"),
        ("[dictionary]\nk = [4, 4]", "two dictionaries are called .*variant"),
        ("[dictionary]\nk = ", "is not a TOML file"),
    ],
)
def test_a_bad_setting_is_refused_with_file_key_and_cure(tmp_path: Path, change: str, message: str):
    with pytest.raises(StudyError, match=message) as caught:
        study(tmp_path, MINIMAL + change)
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_key_and_file_are_named(tmp_path: Path):
    with pytest.raises(StudyError, match=r"activations\.layer: missing"):
        study(tmp_path, MINIMAL.replace("layer = 15", ""))
    with pytest.raises(StudyError, match="model: missing"):
        study(tmp_path, MINIMAL.replace("[model]", "").replace('source = "smollm2-135m-instruct"', ""))
    with pytest.raises(StudyError, match="no study file"):
        Study.load(tmp_path / "absent.toml")


@pytest.mark.parametrize("text", ["model = 3", "[corpus]\nsources = 3", "dictionary = 3", "corpus = []"])
def test_values_where_tables_belong_are_refused_without_a_traceback(tmp_path: Path, text: str):
    with pytest.raises(StudyError):
        study(tmp_path, text)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    with pytest.raises(StudyError, match="not a TOML file"):
        Study.load(tmp_path / "latin.toml")


def test_the_paper_is_trained_at_the_site_of_standard():
    """Studies that share an artifact must agree on it; the paper's has its own dictionary there, without a k."""
    studies = Studies.load(SHIPPED)
    paper, standard = studies.get("paper"), studies.get("standard")
    assert paper.site == standard.site
    (trained,) = paper.dictionaries
    assert (trained.architecture, trained.l1_coefficient) == ("relu", 5)


@pytest.mark.parametrize(("study", "value", "passed"), [("paper", 300, True), ("standard", 300, False)])
def test_l0_is_checked_against_k_where_there_is_one(study: str, value: float, passed: bool):
    wanted = Studies.load(SHIPPED).get(study)
    summary = {"l0": value, "fvu": 0.1, "dead": 0.0, "ce_recovered": 0.9}
    (l0,) = (v for v in verdicts("dictionary", summary, Order(wanted, wanted.dictionaries[0])) if v.check.name == "l0")
    assert l0.passed == passed
    assert ("any number" in l0.text) == passed
