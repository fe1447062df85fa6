"""The shapes of all that pages show and the JSON API returns: one for both."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from sae_core.atlas import Ancestor, Hit
from sae_core.features import FeatureRow


class View(BaseModel):
    """Base of all that is shown; the string under a field is its description in the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Named(View):
    """A feature, as another one's page lists it."""

    feature: int
    label: str
    """Its label; the lexical one where no label was written, empty before labels are made."""
    beats_control: bool | None = None
    """Whether the label does better than another feature's, on text that its writer did not see; null: not scored."""


class Near(Named):
    """A feature whose decoder row points a similar way."""

    cosine: float
    """Cosine of the two decoder rows, -1 to 1."""


class Together(Named):
    """A feature that was seen at its strongest where this one fires."""

    tokens: int
    """Tokens that are the peak of one of its examples and on which this feature fires too."""


class Score(View):
    """How well a label predicts where its feature fires."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    """Ends of its interval."""
    control: float | None = None
    """The same score of a label that has nothing to do with the feature."""
    lexical: float | None = None
    """The same score of the name made without a language model."""
    random: float | None = None
    nearest: float | None = None
    neighbor: float | None = None
    """The score against the silent texts of one kind alone: drawn at random, the most similar, and such in which a
    feature with a similar decoder row fires."""
    failed: float = 0.0
    """Share of the texts on which there was no answer that can be read."""
    n_firing: int = 0
    n_silent: int = 0
    """Texts it was scored on, in which the feature fires, and does not."""


class Label(View):
    """A feature's label, and where it comes from."""

    label: str
    """Empty where none was written."""
    lexical: str
    """The name made without a language model."""
    description: str
    kind: str
    """What explains the feature: `input`, `output`, `both`, `unclear`; empty where no label was written."""
    status: str
    """`written`, `failed`, `lexical` (not asked for), `dead`."""
    confidence: float | None
    """The label writer's own, 0 to 1."""
    model: str
    """Who wrote it."""
    prompt_version: str
    made_at: str
    """When it was written, UTC; empty where none was."""
    error: str
    """Why it failed."""
    scores: list[Score]
    beats_control: bool | None
    """Whether it does better than another feature's label, on text that its writer did not see; null: not scored."""


class Passage(View):
    """A stretch of text in which a feature fires."""

    act: float
    """Activation at the peak."""
    tokens: list[str]
    acts: list[float]
    """Activation on each token."""
    peak: int
    """The peak's place in `tokens`."""
    kind: str
    """`top`: one of the strongest; `level`: drawn at random from its level; `silent`: a counter-example."""
    document: int
    position: int
    """The peak's place among the document's tokens."""
    source: str
    title: str
    language: str
    shown: bool = False
    """The label's writer saw it, so that the label was not scored on it."""


class Level(View):
    """Examples of one range of activations."""

    low: float
    high: float
    """The range, as shares of the feature's maximum: above `low`, up to `high`."""
    share: float
    """Share of all firings that lie in it."""
    examples: list[Passage]


class FeatureView(View):
    """One feature with everything about it. What a stage that is not made yet would tell is null or empty."""

    dictionary: str
    corpus: str
    name: str
    """The label; the lexical one where no label was written."""
    row: FeatureRow
    label: Label | None
    levels: list[Level]
    """From the strongest activations down to near zero."""
    counter_examples: list[Passage]
    """Text in which it should fire by what is said of it, and does not (`silent`); then examples in which it fires,
    and should not. Of the first there is none where no sample of the corpus is kept."""
    counter_by_label: bool
    """By the meaning of its label; else by the tokens that it fires on most."""
    neighbors: list[Near]
    cluster: int | None
    """On the map; -1 is none, null before the map is made."""
    output_score: float | None
    """How far the tokens that it promotes climb in rank when it is turned up; null where it was not measured."""
    suggested_strength: float | None
    """The largest strength, in units of its maximum, at which its texts stayed fluent; null: none was looked for."""
    role: str
    """`output` when turning it up does more than random directions do, else `input`; empty where not measured."""
    history: list[Ancestor]
    """What became of it from one retraining to the next, newest first."""
    previous: int | None
    next: int | None


class SteeredFeature(Named):
    """A feature, as one who steers it wants to know it."""

    is_dead: bool
    """It never fires on the corpus, and cannot be steered."""
    max_act: float
    """Its largest activation over the corpus: the unit of strengths."""
    strength: float
    """One to begin with."""
    suggested_strength: float | None
    """The largest at which its texts stayed fluent; null where none was looked for."""
    output_score: float | None
    """How far the tokens that it promotes climb in rank when it is turned up; null where it was not measured."""
    role: str
    """`output` where that is more than random directions do, else `input`; empty where it was not measured."""


class SteeredToken(View):
    """A token of one of the answers that are written beside each other."""

    column: str
    """`default`, `steered`, or `words`: asked in words for what is turned up."""
    text: str
    """What can be shown now; empty while a character is not whole."""
    logprob: float
    """Natural logarithm of its probability."""
    finish: str
    """`stop` or `length` of the last; empty when more follow."""
    before: list[float]
    """What each steered feature had on the token before, before anything was done to it."""


class SearchView(View):
    """Features that a search found, the best first."""

    dictionary: str
    query: str
    hits: list[Hit]
    more: bool
    """Whether there are more after these."""
    offset: int
    by_meaning: bool
    """Whether meaning was searched as well as words."""


class DocumentView(View):
    """A document of a corpus."""

    corpus: str
    document: int
    title: str
    source: str
    language: str
    kind: str
    license: str
    split: str
    n_tokens: int
    text: str


class Marked(Named):
    """An example in its document."""

    before: str
    after: str
    """The document's text around it."""
    passage: Passage
    dictionary: str
    max_act: float


class Stage(View):
    """A stage of the atlas."""

    stage: str
    made: bool
    made_at: str
    """UTC; empty where it is not made."""
    cure: str
    """The command that makes it."""
    on_request: bool = False
    """It is no part of the atlas, and made when somebody asks for it."""


class Listed(View):
    """A list of features worth a look."""

    title: str
    about: str
    features: list[Hit]


class Quality(View):
    """A score of labels, in the mean over those that have it."""

    name: str
    labels: int
    value: float
    control: float | None
    """What other features' labels got on the same texts."""
    lexical: float | None
    """What the names made without a language model got."""


class Overview(View):
    """What an atlas is of, how good it is, and what it does not have yet."""

    dictionary: str
    dictionaries: list[str]
    study: str
    """Empty where no known study asks for this dictionary."""
    description: str
    model: str
    hook: str
    layer: int
    architecture: str
    corpus: dict[str, Any]
    """Summary of the corpus: documents, tokens, sources with their licenses."""
    health: dict[str, float]
    """Numbers of the dictionary on held-out text: fvu, l0, dead, delta_ce, ce_recovered."""
    features: dict[str, Any]
    """Summary of the features: n_features, n_alive, n_dense, median_density."""
    labels: dict[str, Any] | None
    """Summary of the labels: n_labeled, n_failed, model; null before they are made."""
    quality: list[Quality]
    """How far the written labels can be believed; empty where none was scored."""
    lists: list[Listed]
    stages: list[Stage]


class MapCluster(View):
    """A group of features on the map."""

    id: int
    """As in the table's column `cluster`."""
    name: str
    """The tokens that tell it from the others."""
    x: float
    y: float
    """Median of its features' places."""
    size: int
    """Features in it."""


class MapSummary(View):
    """How to read the table of points."""

    n: int
    """Rows: features on the map."""
    columns: list[str]
    """Of the table, one after the other."""
    chunk: int
    """Names in one file of names."""
    has_score: bool
    """Whether any label was scored."""
    version: str
    """Of all that is drawn: part of the addresses of the table and the names."""
    clusters: list[MapCluster]
    """The largest first."""
