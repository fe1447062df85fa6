from sae_core.artifacts import PROJECT
from sae_core.studies import Studies


def test_the_paper_is_trained_at_the_site_of_standard():
    """Studies that share an artifact must agree on it; the paper's has its own dictionary there, without a k."""
    studies = Studies.load(PROJECT / "pipelines" / "studies")
    paper, standard = studies.get("paper"), studies.get("standard")
    assert paper.site == standard.site
    (trained,) = paper.dictionaries
    assert (trained.architecture, trained.l1_coefficient) == ("relu", 5)
