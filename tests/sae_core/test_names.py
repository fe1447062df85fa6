import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.names import DictionarySpec, Hook, Site, SlugError

PLAIN = st.from_regex(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?", fullmatch=True)
MODEL = st.lists(PLAIN, min_size=1, max_size=3).map(".".join)
SITES = st.builds(Site, MODEL, st.sampled_from(["resid_pre", "mlp_out"]), st.integers(0, 200), PLAIN)

WRITTEN = st.tuples(st.sampled_from(["mlp_out", "attn_out", "resid_post"]), st.integers(0, 200))
VARIANTS = st.from_regex(r"[a-z0-9-]*", fullmatch=True)


@given(SITES)
def test_a_site_is_its_slug_and_back(site: Site):
    assert Site.parse(site.slug) == site


@given(SITES, st.integers(1), st.integers(1), st.floats(0, exclude_min=True, allow_infinity=False), VARIANTS, WRITTEN)
def test_a_dictionary_is_its_slug_and_back(
    site: Site, d_sae: int, k: int, l1_coefficient: float, variant: str, written: tuple[Hook, int]
):
    for spec in (
        DictionarySpec(site, "batch_top_k", d_sae, k, variant=variant),
        DictionarySpec(site, "relu", d_sae, l1_coefficient=l1_coefficient, variant=variant),
        DictionarySpec(site, "transcoder", d_sae, k, variant=variant, writes=written),
    ):
        assert DictionarySpec.parse(spec.slug) == spec


@pytest.mark.parametrize("slug", ["", "a", "a.b.c.d", "m.resid_post.15.c", "m.resid_post.L15."])
def test_what_is_no_slug_is_refused(slug: str):
    with pytest.raises(SlugError, match="expected"):
        Site.parse(slug)
    with pytest.raises(SlugError, match="expected"):
        DictionarySpec.parse(slug)
