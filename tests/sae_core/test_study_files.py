from pathlib import Path

import pytest

from sae_core.artifacts import PROJECT
from sae_core.stages import recipes
from sae_core.study import Study
from sae_core.study_files import StudyError, load_study, save_study

MINIMAL = """
[model]
source = "smollm2-135m-instruct"
[corpus]
sources = ["wiki-en"]
[activations]
layer = 15
"""


def study(tmp_path: Path, text: str, name: str = "mine.toml") -> Study:
    (tmp_path / name).write_text(text, "utf-8")
    return load_study(tmp_path / name)


def test_slugs_read_as_the_design_says(tmp_path: Path):
    quick = study(tmp_path, MINIMAL, "quickstart.toml")
    assert quick.site.slug == "smollm2-135m-instruct.resid_post.L15.quickstart"
    assert quick.spec(quick.dictionaries[0]).slug == f"{quick.site.slug}.batch_top_k.w4096.k32"


def test_what_has_no_k_is_named_by_its_penalty(tmp_path: Path):
    paper = study(tmp_path, MINIMAL + '[dictionary]\narchitecture = "relu"\nl1_coefficient = [5, 0.5]')
    assert [d.k for d in paper.dictionaries] == [None, None]
    ends = [paper.spec(d).slug.removeprefix(paper.site.slug) for d in paper.dictionaries]
    assert ends == [".relu.w4096.l5", ".relu.w4096.l0_5"]


def test_lists_in_the_dictionary_table_make_a_sweep(tmp_path: Path):
    sweep = study(tmp_path, MINIMAL + "[dictionary]\nd_sae = [1024, 4096]\nk = [16, 32, 64]\nseed = 1")
    assert [(d.d_sae, d.k) for d in sweep.dictionaries] == [(w, k) for w in (1024, 4096) for k in (16, 32, 64)]
    assert {d.seed for d in sweep.dictionaries} == {1}


def test_lists_in_the_activations_table_make_every_dictionary_at_every_site(tmp_path: Path):
    many = study(tmp_path, MINIMAL.replace("layer = 15", "layer = [8, 15]") + "[dictionary]\nk = [16, 32]")
    assert [one.spec(d).slug.split(".", 1)[1] for one, d in many.trainings] == [
        f"resid_post.L{layer}.mine.batch_top_k.w4096.k{k}" for layer in ("08", "15") for k in (16, 32)
    ]


def test_a_transcoder_is_named_by_what_it_reads_and_what_it_writes(tmp_path: Path):
    text = MINIMAL.replace("layer = 15", 'layer = [8, 15]\nhook = "mlp_in"') + "[dictionary]\narchitecture = "
    (first, second) = study(tmp_path, text + "'transcoder'").trainings
    for (one, d), layer in ((first, "08"), (second, "15")):
        assert one.spec(d).slug == f"{one.site.slug}.transcoder.mlp_out.L{layer}.w4096.k32"
    deeper = study(tmp_path, text + "'transcoder'\nwrites = 'resid_post'\nwrites_layer = 17")
    assert [(s.hook, s.layer) for s in deeper.all_sites] == [("mlp_in", 8), ("mlp_in", 15), ("resid_post", 17)]
    slugs = [recipe.slug for recipe in recipes(deeper) if recipe.stage == "dictionary"]
    assert slugs == [one.spec(d).slug for one, d in deeper.trainings]


def test_relative_paths_are_seen_from_the_study_file(tmp_path: Path):
    text = MINIMAL.replace('"wiki-en"', '"./texts", {source = "../more.jsonl", weight = 2}')
    sources = study(tmp_path, text).corpus.sources
    assert [s.source for s in sources] == [str(tmp_path / "texts"), str(tmp_path.parent / "more.jsonl")]
    assert sources[1].weight == 2


@pytest.mark.parametrize("value", ['"./sae"', '["./sae"]'])
def test_the_folder_of_an_imported_dictionary_is_seen_from_the_study_file(tmp_path: Path, value: str):
    (imported,) = study(tmp_path, MINIMAL + f"[dictionary]\nsource = {value}").dictionaries
    assert imported.source == str(tmp_path / "sae")


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
        (
            "[dictionary]\nbatch_tokens = [64, 500_000]",
            "batch_tokens = 500000 is more than corpus.tokens = 4",
        ),
        ("[dictionary]\nk = ", "is not a TOML file"),
        ("seed = [0, 1]", "two sites are called .*only activations.hook and layer may be lists"),
        ("hook = 'nowhere'", "activations.hook = 'nowhere': .*resid_post"),
        ("[dictionary]\narchitecture = 'transcoder'", "writes = mlp_out of layer 15 does not come after .* resid_post"),
        ("hook = 'mlp_in'\n[dictionary]\narchitecture = 'transcoder'\nwrites_layer = 3", "mlp_out of layer 3 does not"),
        ("[dictionary]\nwrites = 'mlp_out'", "writes = mlp_out is no setting of batch_top_k"),
        ("[dictionary]\nwrites_layer = 0", "writes_layer = 0 is no setting of batch_top_k"),
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
        load_study(tmp_path / "absent.toml")


@pytest.mark.parametrize("text", ["model = 3", "[corpus]\nsources = 3", "dictionary = 3", "corpus = []"])
def test_values_where_tables_belong_are_refused_without_a_traceback(tmp_path: Path, text: str):
    with pytest.raises(StudyError):
        study(tmp_path, text)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    with pytest.raises(StudyError, match="not a TOML file"):
        load_study(tmp_path / "latin.toml")


def test_circuits_want_two_sites_and_a_folder_of_tasks_is_seen_from_the_file(tmp_path: Path):
    asked = '[circuits]\ntasks = ["agreement"]\nfolder = "./tasks"\n'
    with pytest.raises(StudyError, match=r"wants dictionaries at two sites or more, and there is one: give"):
        study(tmp_path, MINIMAL + asked)
    two = study(tmp_path, MINIMAL.replace("layer = 15", "layer = [8, 15]") + "[dictionary]\nk = [16, 32]\n" + asked)
    assert two.circuits.folder == str((tmp_path / "tasks").resolve())
    assert [d.k for _, d in two.first_trainings] == [16, 16]
    assert two.circuit_slug("agreement") == "mine.agreement"
    assert study(tmp_path, MINIMAL).circuits.tasks == []


def test_a_study_that_is_saved_is_read_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "again.toml"
    for shipped in ("quickstart", "standard", "paper"):
        study = load_study(PROJECT / "pipelines" / "studies" / f"{shipped}.toml")
        study = study.model_copy(update={"name": "again", "description": 'a "quoted" line,\nπ \\ \x7f and a tab\t'})
        save_study(study, file)
        assert load_study(file) == study
