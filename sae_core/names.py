"""The names of things: what is made at a site of a model, as a slug and back. Nothing else makes names.

A slug is a file's name and a partition's key. This module is light: it imports no model library.
"""

import re
from typing import Literal, NamedTuple, cast, get_args

from sae_core.errors import MindAtlasError

Hook = Literal["resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out"]
REACHED: tuple[Hook, ...] = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
"""A layer's sites in the order in which a forward pass comes by."""


class SlugError(MindAtlasError):
    """A name that is no site's, or no dictionary's."""


class Site(NamedTuple):
    """A place in a model, read over a corpus."""

    model: str
    hook: Hook
    layer: int
    corpus: str

    @property
    def slug(self) -> str:
        return f"{self.model}.{self.hook}.L{self.layer:02d}.{self.corpus}"

    @classmethod
    def parse(cls, slug: str) -> "Site":
        """The site of a slug. Raises SlugError when it is none. Model names may hold dots; the other parts do not."""
        parts = slug.rsplit(".", 3)
        if len(parts) != 4 or not all(parts) or parts[1] not in get_args(Hook) or not re.fullmatch(r"L\d+", parts[2]):
            raise SlugError(f"{slug!r} is no site: expected <model>.<hook>.L<layer>.<corpus>")
        return cls(parts[0], cast(Hook, parts[1]), int(parts[2][1:]), parts[3])


class DictionarySpec(NamedTuple):
    """One dictionary at a site: what its name says of it."""

    site: Site
    architecture: str
    d_sae: int
    k: int | None = None
    l1_coefficient: float | None = None
    """Names what has no `k`."""
    variant: str = ""
    writes: tuple[Hook, int] | None = None
    """Kind and layer of the site that a transcoder writes; `site` is the one it reads."""

    @property
    def slug(self) -> str:
        to = f".{self.writes[0]}.L{self.writes[1]:02d}" if self.writes else ""
        sparsity = f"k{self.k}" if self.l1_coefficient is None else f"l{_number_slug(self.l1_coefficient)}"
        end = f".{self.variant}" if self.variant else ""
        return f"{self.site.slug}.{self.architecture}{to}.w{self.d_sae}.{sparsity}{end}"

    @classmethod
    def parse(cls, slug: str) -> "DictionarySpec":
        """The dictionary of a slug. Raises SlugError when it is none."""
        found = re.fullmatch(
            rf"(.+)\.([a-z_]+)(?:\.({'|'.join(REACHED)})\.L(\d+))?"
            r"\.w(\d+)\.(?:k(\d+)|l(\d+(?:_\d+)?(?:e[+-]?\d+)?))(?:\.([a-z0-9-]+))?",
            slug,
        )
        if not found:
            raise SlugError(
                f"{slug!r} is no dictionary: expected <site>.<architecture>.w<d_sae>.k<k>[.<variant>], "
                "or l<l1_coefficient> in place of k<k>, or transcoder.<hook>.L<layer> for the architecture"
            )
        site, architecture, hook, layer, d_sae, k, penalty, variant = found.groups()
        writes = (cast(Hook, hook), int(layer)) if hook else None
        l1_coefficient = float(penalty.replace("_", ".")) if penalty else None
        k = int(k) if k else None
        return cls(Site.parse(site), architecture, int(d_sae), k, l1_coefficient, variant or "", writes)


def to_slug(name: str) -> str:
    """`name` in lower case, with what no file name should hold as `-`. Raises ValueError when nothing is left."""
    found = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")
    if not found:
        raise ValueError(f"{name!r} leaves nothing to name files with: use letters and digits")
    return found


def _number_slug(number: float) -> str:
    """A number without a dot, which parts names: `5`, `0_5`."""
    return repr(float(number)).removesuffix(".0").replace(".", "_")
