"""The schema of a study: what to map, and every setting that decides what an artifact holds.

Each is declared here, once, with its default and the source of that default. How a machine does the work (device,
threads, concurrency) is no part of a study. Files are read by `study_files`.

This module is light: it must import in milliseconds, because every Dagster process reads it.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from sae_core.names import REACHED, DictionarySpec, Hook, Site, to_slug
from sae_core.settings import Settings

Architecture = Literal[
    "batch_top_k", "top_k", "matryoshka_batch_top_k", "jump_relu", "jump_relu_tanh", "gated", "relu", "transcoder"
]
PENALIZED = {"relu": 5.0, "gated": 1.0, "jump_relu_tanh": 5.0}
"""Architectures whose sparsity hangs on `l1_coefficient`, and its default.

`relu`: Templeton et al. 2024. `gated`: SAELens's default; what SAEBench trained (0.012 to 0.08 at E|x|^2 = 1) is 0.3 to
1.9 at a d_model of 576. `jump_relu_tanh`: SAELens's documentation; Anthropic had 10 or more, on larger models.
"""
Scorer = Literal["embedding", "detection", "fuzzing", "specificity", "simulation"]
Share = Annotated[float, Field(ge=0, le=1)]
Packing = Literal["documents", "concat"]


class ModelSettings(Settings):
    """The language model whose activations are mapped."""

    source: str
    """A catalog name (`smollm2-135m-instruct`), a Hugging Face id, a local folder, or a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; a commit makes the study reproducible."""

    @property
    def slug(self) -> str:
        """The model's short name in paths: the last part of its source, in lower case."""
        return to_slug(Path(self.source).name.removesuffix(".gguf"))


class Source(Settings):
    """One source of text."""

    source: str
    """A catalog name (`wiki-en`), a folder or file (text, JSONL, Parquet), `hf:` and a `datasets` id, or `made:` and a
    generator (`made:dna`): text that is planted, for the safety audit to find."""
    weight: float = Field(1.0, gt=0)
    """Share of the token budget, relative to the other sources; what a small source cannot fill goes to the rest."""
    text_field: str = "text"
    """Column or key that holds the text (JSONL, Parquet, `datasets`)."""
    language: str = ""
    """Language of the text, when one knows it; catalog entries bring their own."""
    kind: str = ""
    """Register of the text (`encyclopedia`, `code`), when one knows it."""
    license: str = ""
    """License of the text; catalog entries bring their own."""
    config: str | None = None
    """Configuration of a `datasets` id."""
    split: str = "train"
    """Split of a `datasets` id."""
    revision: str | None = None
    """Branch, tag or commit of a `datasets` id."""


class CorpusSettings(Settings):
    """Text, de-duplicated, tokenized with the model's tokenizer and packed into blocks."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of the corpus; studies that give the same name must give the same settings. Default: the study's name."""
    sources: list[Source] = Field(min_length=1)
    """Where the text comes from; a plain string is short for `{source = ...}`."""
    tokens: int = Field(400_000, ge=1)
    """Token budget over all sources; a corpus that runs short ends earlier and says so."""
    block_tokens: int = Field(256, ge=8)
    """Tokens a block: the longest context that the model sees while activations are made."""
    held_out: float = Field(0.05, gt=0, lt=1)
    """Share of the documents kept from training, for every reported number."""
    min_characters: int = Field(40, ge=1)
    """Shorter documents are dropped."""
    max_document_tokens: int = Field(4096, ge=8)
    """Longer documents are cut here, so that no single one fills the corpus."""
    seed: int = 0
    """Order of the documents and choice of the held-out ones."""

    @field_validator("sources", mode="before")
    @classmethod
    def _strings_are_sources(cls, value: Any) -> Any:
        return [{"source": s} if isinstance(s, str) else s for s in value] if isinstance(value, list) else value


class ActivationSettings(Settings):
    """Which activations are read, and how they are kept."""

    hook: Hook = "resid_post"
    """Where the model is read: the residual stream before or after a layer, or a sublayer's input or output. A list
    here or in `layer` makes several sites, all read in one pass of the model, each with all of the dictionaries."""
    layer: int = Field(ge=0)
    """Layer that is read, counted from 0; the middle of the model is the paper's choice."""
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Arithmetic of the model's forward pass, and the type the activations are kept in; float16 ends at 65,504, and
    what exceeds it is refused."""
    packing: Packing = "documents"
    """What a token may attend to: its own document, so that its activation is that of the document run alone; or, as is
    common, all of the block before it (`concat`), whatever document that is of."""
    sink_norm: float = Field(4.0, gt=1)
    """Tokens whose norm is above this many medians are attention sinks, left out of training and statistics.

    At layer 15 of SmolLM2-135M, of 196,608 tokens 1% are above 10 medians, four lie between 5 and 10, and none
    between 2.1 and 5: any bound in that gap tells sinks from text.
    """
    sink_positions: int = Field(0, ge=0)
    """So many tokens at the start of what is attended to count as sinks whatever their norm; 0: the norm decides."""
    special_tokens: Literal["leave_out", "keep"] = "leave_out"
    """Whether beginning-of-sequence and end-of-text tokens are left out of training and statistics, as sinks are.
    Padding always is."""
    kept_as: Literal["computed", "float32", "bfloat16", "float16", "int8"] = "computed"
    """Type the activations are kept in; `computed` is the type of `precision`. `int8` takes half the disk of bfloat16,
    with a scale for each token; the summary says what that loses, as a fraction of the variance."""
    compiled: bool = False
    """Whether the model's layers are compiled first (torch.compile), but for those that are read. On two cores this
    takes a quarter of a minute and saves a sixth of the pass: it pays from about 200,000 tokens on. It needs a C++
    compiler, and rounds at other places than the plain model does."""
    stored: bool = True
    """Off: only places and sums are kept, and the model runs again whenever activations are read. The result is the
    same to the bit; it takes no disk, and a pass of the model for each pass over the activations."""
    shard_tokens: int = Field(65_536, ge=256)
    """Tokens a shard file; the shuffle mixes tokens within a shard and blocks over all shards."""
    seed: int = 0
    """Order of the blocks over the shards, and of the tokens within a shard."""

    @model_serializer(mode="wrap")
    def _unless_as_always(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What could not be set once is none of the fingerprint unless it is set."""
        later = {
            "stored": True, "packing": "documents", "sink_positions": 0, "special_tokens": "leave_out",
            "kept_as": "computed", "compiled": False,
        }  # fmt: skip
        return {key: value for key, value in dump(self).items() if key not in later or later[key] != value}

    @model_validator(mode="after")
    def _kept_at_all(self) -> "ActivationSettings":
        if self.kept_as != "computed" and not self.stored:
            raise ValueError(f"kept_as = {self.kept_as} says how, and stored = false that nothing is kept: give one")
        return self

    @property
    def dtype(self) -> str:
        """The type the activations are kept in, by name."""
        return self.precision if self.kept_as == "computed" else self.kept_as

    def at(self, hook: Hook, layer: int) -> "ActivationSettings":
        """The same at another site."""
        return self.model_copy(update={"hook": hook, "layer": layer})


class DictionarySettings(Settings):
    """The sparse dictionary and how it is trained."""

    architecture: Architecture = "batch_top_k"
    """Which sparse autoencoder; see `sae_core/dictionary/`. A `transcoder` writes another site than it reads."""
    writes: Hook | None = None
    """Kind of the site that a transcoder writes; default `mlp_out`. It must come after the one that is read."""
    writes_layer: int | None = Field(None, ge=0)
    """Layer of that site; default the one that is read."""
    source: str = ""
    """Folder of a finished one (SAELens, dictionary_learning, sparsify) to import; empty to train. What names a
    dictionary (architecture, d_sae, k or l1_coefficient) must be what the folder says; how to train has no effect."""
    d_sae: int = Field(4096, ge=1)
    """Number of features."""
    k: int | None = Field(None, ge=1)
    """Features active on a token, on average; default 32. Of every architecture without a penalty."""
    l1_coefficient: float | None = Field(None, gt=0)
    """Weight of the penalty on activations (lambda) of the architectures in `PENALIZED`, which has the defaults."""
    tokens: int = Field(2_000_000, ge=1)
    """Activations seen in training; a smaller set is read several times over, in a new order each time."""
    batch_tokens: int = Field(2048, ge=1)
    """Activations a step."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; default 1e-3 / sqrt(d_sae / 2^14).

    The law is Gao et al.'s (2024). The factor is five times that of dictionary_learning, whose runs see hundreds of
    millions of activations: after one million, at SmolLM2's layer 15, FVU is 0.166 and not 0.237.
    """
    lr_warmup: Share = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    lr_decay: Share = 0.2
    """Share of the steps, at the end, over which it falls to 0 (Anthropic, April 2024)."""
    aux_coefficient: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss that revives dead features (Gao et al. 2024, A.2); beside a penalty is none."""
    dead_after_tokens: int = Field(200_000, ge=1)
    """A feature that has not fired for this many activations counts as dead in training."""
    evaluation_tokens: int = Field(16_384, ge=256)
    """Held-out tokens on which the dictionary is spliced into the model to measure loss recovered."""
    b_dec_start: Literal["mean", "geometric_median"] = "mean"
    """Where the decoder's bias starts: the mean of all activations, or the geometric median of 32,768 of them, on which
    a few far-off ones have little pull (Bricken et al. 2023)."""
    seed: int = 0
    """Initial weights and order of the batches."""
    variant: str = Field("", pattern=r"^[a-z0-9-]*$")
    """Suffix of the dictionary's name, for a second one that differs in none of the named settings."""

    @model_validator(mode="before")
    @classmethod
    def _sparsity(cls, values: Any) -> Any:
        """Fill in the default of the one setting that the architecture's sparsity hangs on, and refuse the other; so
        with what only a transcoder has."""
        if not isinstance(values, dict):
            return values
        own, foreign = _sparsity_keys(architecture := values.get("architecture", "batch_top_k"))
        if values.get(foreign) is not None:
            raise ValueError(f"{foreign} = {values[foreign]} is no setting of {architecture}: give {own} in its place")
        defaults: dict[str, Any] = {own: 32 if own == "k" else PENALIZED[architecture]}
        if architecture == "transcoder":
            defaults["writes"] = "mlp_out"
        elif named := next((key for key in ("writes", "writes_layer") if values.get(key) is not None), None):
            raise ValueError(f"{named} = {values[named]} is no setting of {architecture}: only a transcoder writes")
        return values | {key: default for key, default in defaults.items() if values.get(key) is None}

    @model_serializer(mode="wrap")
    def _own_settings(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What is no setting of the architecture is none of its fingerprint, nor what could not be set once."""
        later = {"source": "", "b_dec_start": "mean"}
        foreign = _sparsity_keys(self.architecture)[1]
        return {key: value for key, value in dump(self).items() if key != foreign and later.get(key) != value}

    @model_validator(mode="after")
    def _k_fits(self) -> "DictionarySettings":
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}: give a k of at most d_sae")
        if self.lr_warmup + self.lr_decay > 1:
            raise ValueError("lr_warmup and lr_decay together exceed 1: the two shares must not overlap")
        return self

    def read_at(self, site: ActivationSettings) -> "DictionarySettings":
        """The same for what is read at this site: with the layer that is written, which may hang on it."""
        if self.writes is None or self.writes_layer is not None:
            return self
        return self.model_copy(update={"writes_layer": site.layer})


def _sparsity_keys(architecture: Any) -> tuple[str, str]:
    """The setting that an architecture's sparsity hangs on, and the one that it does not know."""
    return ("l1_coefficient", "k") if architecture in tuple(PENALIZED) else ("k", "l1_coefficient")


class FeatureSettings(Settings):
    """What is kept about each feature: how often it fires, on what, and what it promotes."""

    levels: int = Field(5, ge=1, le=50)
    """Activation levels, equally wide from 0 to the feature's maximum, from which examples are drawn."""
    top_examples: int = Field(12, ge=1)
    """Strongest examples kept, at most one for each context."""
    level_examples: int = Field(4, ge=0)
    """Examples drawn at random from each level."""
    context_tokens: int = Field(32, ge=2)
    """Tokens of context kept with an example."""
    windows: int = Field(512, ge=1)
    """Windows of text, at most one in a block, kept with every firing in them: where a feature does not fire."""
    promoted_tokens: int = Field(12, ge=1)
    """Tokens listed whose logit the feature raises most, and as many that it lowers most."""
    seed: int = 0
    """Choice of the examples within a level."""


class NeighborSettings(Settings):
    """Nearest features by the angle between decoder rows."""

    count: int = Field(20, ge=1)
    """Neighbors kept for each feature."""
    exact_up_to: int = Field(65_536, ge=1)
    """Up to this many features the index is exact; above it is an HNSW graph whose recall is measured."""
    hnsw_links: int = Field(32, ge=4)
    """Links a node of the HNSW graph (M)."""
    hnsw_search: int = Field(256, ge=8)
    """Breadth of the HNSW search (efSearch); higher is slower and finds more."""


class FeatureMapSettings(Settings):
    """A picture of the features: nearby points have similar decoder rows."""

    n_neighbors: int = Field(15, ge=2)
    """UMAP neighborhood (Bricken et al. 2023)."""
    min_dist: float = Field(0.05, ge=0)
    """UMAP least distance between points (Bricken et al. 2023)."""
    min_cluster_size: int = Field(8, ge=2)
    """Smallest HDBSCAN cluster."""
    seed: int = 0
    """Layout; with a seed UMAP runs on one thread and repeats exactly."""


class SteeringSettings(Settings):
    """How well each feature steers: an output score for all, a suggested strength for those with the best."""

    probe_strength: float = Field(2.0, gt=0)
    """Strength, in maxima of the feature, at which output scores are taken; at more, every direction has an effect."""
    promoted_tokens: int = Field(10, ge=1)
    """Tokens of each feature whose ranks are watched."""
    scored: int | None = Field(None, ge=0)
    """Features that get an output score, by largest maximum; empty: every live one. On two cores a feature of
    SmolLM2-135M costs about 30 ms."""
    suggested: int = Field(16, ge=0)
    """Features, by output score, for which a strength is looked for."""
    strengths: list[float] = Field([0.5, 1.0, 1.5, 2.0, 3.0, 4.0], min_length=1)
    """Strengths that are tried, in maxima of the feature."""
    max_tokens: int = Field(24, ge=4)
    """Tokens of each text."""
    temperature: float = Field(0.7, ge=0)
    """Of the texts."""
    perplexity_ratio_max: float = Field(2.0, ge=1)
    """A strength is fluent while the perplexity of its texts, under the model as it is, stays below this many times
    that of the model's own texts,"""
    repetition_max: Share = 0.25
    """and while no more than this share of their token triples was there before."""
    seed: int = 0
    """Of the texts, and of the directions drawn as controls."""


class SteeringReportSettings(Settings):
    """What steering does and what controls do, measured on texts."""

    candidates: int = Field(64, ge=0)
    """Features looked at, by output score, of those that have words of their own."""
    features: int = Field(16, ge=0)
    """Features reported: of these, those whose words are to become the most frequent, by the prompts that choose."""
    words_min: int = Field(3, ge=1)
    """A feature is measured when so many whole words that it promotes or often fires on are rare:"""
    word_rate_max: Share = 1e-4
    """those of at most this share of the corpus's tokens. What is said anyway cannot be said ten times as often."""
    base_rate_max: Share = 0.004
    """And all of them together make up no more than this share of what the model says anyway."""
    seeds: int = Field(2, ge=1)
    """Texts of each prompt, feature and condition."""
    base_seeds: int = Field(4, ge=0)
    """Further texts of each prompt without steering, which all features are held against."""
    max_tokens: int = Field(32, ge=4)
    """Tokens of each text."""
    temperature: float = Field(0.7, ge=0)
    """Of the texts."""
    strengths: list[float] = Field([0.5, 0.75, 1.0, 1.25, 1.5, 2.0], min_length=1)
    """Strengths among which half the prompts choose."""
    forecast_ratio_max: float = Field(1.5, ge=1)
    """The strength of the highest expected concept rate is chosen among those whose expected perplexity, over that of
    the model as it is, stays below this: less than what is allowed of texts, which drift."""
    perplexity_ratio_max: float = Field(2.0, ge=1)
    """Texts of a larger perplexity ratio do not count."""
    lever_tokens: int = Field(16_384, ge=1)
    """Tokens of held-out text in which firings are looked for, for the levers test."""
    seed: int = 0
    """Of the texts and the controls."""


class LabelSettings(Settings):
    """Short names for features, written by a language model from examples."""

    model: str = "qwen2.5-coder-1.5b-instruct"
    """A catalog name (served by llama.cpp on loopback), or the model's name at `base_url`."""
    base_url: str = ""
    """An OpenAI-compatible endpoint; empty for a local server. The key comes from OPENAI_API_KEY."""
    features: int = Field(40, ge=0)
    """Features given a written label, strongest first; every live feature gets a lexical label besides."""
    examples: int = Field(8, ge=1)
    """Examples shown for each feature: half of them its strongest, half over the deciles of its activations."""
    contrast: int = Field(0, ge=0)
    """Texts shown besides that are the most similar to these, and in which it does not fire."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 takes the most likely answer."""
    seed: int = 0
    """Choice of the examples shown, and of the sampling where the server takes one."""
    scorers: list[Scorer] = Field(["embedding", "detection", "fuzzing"])
    """How labels are scored, on examples from other documents than those shown; all but embedding ask `model`.
    Specificity (0 to 3) and simulation (Pearson; wants log-probabilities, and many tokens) are made when named here."""
    embedder: str = "all-minilm-l6-v2"
    """The sentence-embedding model that says how alike a label and a text are, and finds the texts that read most like
    those in which a feature fires: a catalog name, a folder, or an id on the hub."""
    score_examples: int = Field(12, ge=2)
    """Texts in which the feature fires, of which a label is scored on at most so many, and as many in which it does
    not. Paulo et al. 2024 take 100, which wants `features.level_examples` of 20 or more."""
    judged: int | None = Field(None, ge=0)
    """Features scored by asking `model`, the first ones; default: all at an endpoint, none by a local model."""
    ask_each: bool | None = None
    """Whether detection and fuzzing ask about one text at a time, and take how likely a yes is: what a small model can
    do. Default: by a local model; at an endpoint 25 texts a question, which take an eighth of the tokens."""
    max_dollars: float | None = Field(None, ge=0)
    """Most that the labels may cost; a request that might go beyond it is not sent, and what is written is kept."""
    max_requests: int | None = Field(None, ge=0)
    """Most requests that the labels may take, repeated ones included."""
    prompt_price: float | None = Field(None, ge=0)
    """Dollars a million tokens read, where no table knows them; with `completion_price`."""
    completion_price: float | None = Field(None, ge=0)
    """Dollars a million tokens written."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at once at `base_url`; a local server takes one at a time. It changes no label."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which a request to `base_url` is taken for lost, and sent again. It changes no label."""

    def judged_of(self, labeled: int) -> int:
        """How many of so many labeled features are scored by asking a model."""
        most = self.judged if self.judged is not None else labeled if self.base_url else 0
        return min(labeled, most) if set(self.scorers) - {"embedding"} else 0

    @property
    def asks_each(self) -> bool:
        """Whether detection and fuzzing ask about one text at a time."""
        return not self.base_url if self.ask_each is None else self.ask_each

    @model_validator(mode="after")
    def _both_prices(self) -> "LabelSettings":
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("prompt_price and completion_price go together: give both, or none")
        return self


class SafetySettings(Settings):
    """The safety audit: which features stand for the concepts that a safety team asks for."""

    concepts: list[str] = Field(default=[])
    """Names of concepts; empty for all."""
    folder: str = ""
    """Folder of concept files of one's own, beside the shipped ones; one of the same name takes its place."""
    features: int = Field(3, ge=1)
    """Features kept for each concept, the best on the prompts that find."""
    false_positive_rate: float = Field(0.05, gt=0, lt=1)
    """Rate of false alarms that the monitors are measured at."""


class BehaviorSettings(Settings):
    """What steering with the features of the audit does to behaviors, against controls."""

    features: int = Field(2, ge=1)
    """Features steered for each behavior: the best that the audit kept for its concept."""
    strength: float = Field(2.0, gt=0)
    """Up and down are clamps to this many maxima of the feature, and to as many below zero."""
    controls: int = Field(10, ge=1)
    """Random directions, and random other features, that each change is held against."""
    seed: int = 0
    """Of the controls."""


class MultilingualSettings(Settings):
    """Which features fire on the same content in several languages."""

    languages: list[str] = Field(default=["en", "fr", "es", "de", "it", "ru", "ar"])
    """ISO 639-1 codes, of which both parallel texts must have an edition."""
    verses: int = Field(50, ge=10)
    """Bible verses, drawn at random; the 30 articles of the Universal Declaration of Human Rights come besides."""
    articles: int = Field(50, ge=10)
    """Encyclopedia articles of one title in English, French and Spanish, drawn at random."""
    least_languages: int = Field(5, ge=2)
    """Languages on which a feature must fire to be called multilingual; all, of a text in fewer."""
    shuffles: int = Field(200, ge=20)
    """Random pairings of the same texts that the true pairing is held against."""
    seed: int = 0
    """Choice of the verses, and of the pairings."""


class CircuitSettings(Settings):
    """Which features the study's tasks rest on, and which of them make which: of the first dictionary of each site."""

    tasks: list[str] = Field(default=[])
    """Names of tasks (`agreement`, `brackets`, `capitals`, `list_order`, `professions`); none: no circuits."""
    folder: str = ""
    """Folder of task files of one's own, in place of the shipped ones."""
    nodes: int = Field(100, ge=1)
    """Nodes kept at most."""
    node_threshold: float = Field(0.01, ge=0)
    """Least effect of a node, as a share of the difference of logits."""
    edge_threshold: float = Field(0.002, ge=0)
    """Least weight of an edge, as such a share."""
    steps: int = Field(10, ge=0)
    """Of integrated gradients from what a prompt is held against (Marks et al. 2024 take 10); 0: the gradient alone."""
    seed: int = 0
    """Of the random circuits."""


class ScalingSettings(Settings):
    """The sweep that scaling laws are fitted to: many short runs, as the study's first dictionary is trained, from
    shared reads of the activations.

    Each is a run of its own, with a learning rate that rises and falls over its own steps: a checkpoint of a longer
    run stands at a rate that a finished dictionary never ends on, and would be compared as if it did.
    """

    d_sae: list[int] = Field([128, 256, 512, 1024, 2048], min_length=3)
    """Sizes, each trained for each of `tokens`; in equal ratios, so that several runs cost the same."""
    tokens: list[int] = Field([65_536, 131_072, 262_144, 524_288, 1_048_576], min_length=3)
    """Activations of a run, in the same ratios."""
    lr_factor: float = Field(2.0, gt=0)
    """Peak learning rate of these runs, as a multiple of `dictionary.lr`'s default; at SmolLM2's layer 15 the best of
    0.5, 1, 2 and 4 in three of four pilot runs of fewer than 300,000 activations."""
    lr_factors: list[float] = Field([0.5, 1.0, 4.0])
    """Others that are tried where d_sae and tokens grow together, but for the largest of these; empty for none."""
    k: list[int] = Field([8, 16, 64])
    """Other k that are tried with the three largest d_sae at the middle one of `tokens`; empty for none."""
    evaluation_tokens: int = Field(16_384, ge=256)
    """Held-out activations that the loss of each run is measured on."""
    resamples: int = Field(100, ge=20)
    """Fits to resampled residuals, which the intervals are of."""
    seed: int = 0
    """Initial weights, order of the batches, and the resampling."""

    @field_validator("d_sae", "tokens")
    @classmethod
    def _rise(cls, sizes: list[int]) -> list[int]:
        if sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError("the sizes must be positive, and each larger than the one before it")
        return sizes


class ScienceSettings(Settings):
    """Which of the papers' findings hold for the dictionaries of the sweep."""

    tokens: int = Field(131_072, ge=1024)
    """Training activations on which features are compared, and concepts looked for."""
    twins: int = Field(256, ge=1)
    """d_sae of the sweep that is trained from a second seed; where the sweep has no such, the second largest."""
    kind_least: float = Field(0.005, gt=0, lt=0.5)
    """Least share of the tokens that a language or kind of text must have for a feature of it to be looked for."""
    families: int = Field(8, ge=0)
    """Families of features that split, shown as a tree."""
    architectures: list[Architecture] = Field(["batch_top_k", "top_k", "relu"])
    """Architectures of which two seeds are trained at `twins` and compared; empty for none, and no transcoder."""
    neuron_tokens: int = Field(32_768, ge=0)
    """Of these activations, those on which the model runs again and its MLP neurons are read; 0 for none."""
    neuron_features: int = Field(512, ge=1)
    """Features, drawn at random, that are held against every neuron of the layers up to the site."""
    control_tokens: int = Field(131_072, ge=0)
    """Text, in whole shards, that is read by the model with shuffled weights, whose dictionary is compared; 0 for
    none."""
    judged: int = Field(0, ge=0)
    """Features of the largest dictionary that the study's label writer names, and whose names it rates from 0 to 3; it
    is asked several times for each."""
    seed: int = 0
    """Of the random directions, and of what is drawn."""

    @field_validator("architectures")
    @classmethod
    def _one_site(cls, architectures: list[Architecture]) -> list[Architecture]:
        if "transcoder" in architectures:
            raise ValueError("a transcoder reads one site and writes another: the sweep has one site; leave it out")
        return architectures


class CheckSettings(Settings):
    """The range in which this study's numbers must lie; outside it an asset check fails."""

    fvu_max: float = Field(0.25, gt=0)
    """Largest fraction of variance unexplained on held-out tokens."""
    l0_tolerance: Share = 0.15
    """Largest relative distance of the held-out L0 from k."""
    dead_max: Share = 0.05
    """Largest share of features that never fire on the corpus."""
    ce_recovered_min: float = Field(0.8, le=1)
    """Least share of the cross-entropy, against mean ablation, that the spliced dictionary keeps."""
    recall_min: Share = 0.95
    """Least recall@10 of the neighbor index against exact search."""
    labeled_min: Share = 0.8
    """Least share of the asked-for features that got a written label."""
    scored_min: Share = 0.8
    """Least share of the written labels that got a score."""
    beats_control_min: Share = 0.5
    """Least share of the scored labels that do better than another feature's label does in their place."""
    label_failures_max: Share = 0.1
    """Largest share of the features asked about whose answers could not be used."""


class RetrainingSettings(Settings):
    """When the study is made again, and when what comes of it is served. No part of any fingerprint."""

    schedule: str = Field("0 3 * * 1", pattern=r"^(\S+ \S+ \S+ \S+ \S+|@\w+)?$")
    """When stale stages are made again, as cron says it; empty for never. Off in Dagster until turned on."""
    warm_start: bool = True
    """A dictionary begins with the weights of the one that is served, so that its features stay what they are."""
    fvu_worse_max: float = Field(0.05, ge=0)
    """How much more of the variance, as a share, a new dictionary may leave unexplained than the one served."""
    dead_worse_max: Share = 0.05
    """How much larger the share of features that stay silent on held-out text may be."""
    kept_min: Share = 0.3
    """Least share of the served features that are found again."""
    generations: int = Field(3, ge=1)
    """Generations that are kept, the served one included."""


class Study(Settings):
    """A study file, checked; a list in a dictionary field has become several dictionaries."""

    name: str
    description: str = ""
    """One sentence for people."""
    model: ModelSettings
    corpus: CorpusSettings
    sites: list[ActivationSettings] = Field(min_length=1)
    """What is read: one entry for each combination of the `[activations]` table's lists."""
    dictionaries: list[DictionarySettings]
    """The sweep: one entry for each combination of the `[dictionary]` table's lists."""
    features: FeatureSettings = FeatureSettings()
    neighbors: NeighborSettings = NeighborSettings()
    feature_map: FeatureMapSettings = FeatureMapSettings()
    steering: SteeringSettings = SteeringSettings()
    steering_report: SteeringReportSettings = SteeringReportSettings()
    labels: LabelSettings = LabelSettings()
    safety: SafetySettings = SafetySettings()
    behaviors: BehaviorSettings = BehaviorSettings()
    multilingual: MultilingualSettings = MultilingualSettings()
    circuits: CircuitSettings = CircuitSettings()
    scaling: ScalingSettings = ScalingSettings()
    science: ScienceSettings = ScienceSettings()
    checks: CheckSettings = CheckSettings()
    retraining: RetrainingSettings = RetrainingSettings()

    @model_validator(mode="after")
    def _batches_fit(self) -> "Study":
        largest = max(dictionary.batch_tokens for dictionary in self.dictionaries)
        if largest > self.corpus.tokens:
            raise ValueError(
                f"dictionary.batch_tokens = {largest} is more than corpus.tokens = {self.corpus.tokens}: "
                "give a batch_tokens of fewer, or more corpus.tokens"
            )
        return self

    @model_validator(mode="after")
    def _written_after_read(self) -> "Study":
        for study, dictionary in self.trainings:
            written, read = study.written(dictionary), study.activations
            if written and _reached(written) <= _reached(read):
                raise ValueError(
                    f"dictionary.writes = {written.hook} of layer {written.layer} does not come after what is read, "
                    f"{read.hook} of layer {read.layer}: a transcoder writes what the model computes later"
                )
        return self

    @model_validator(mode="after")
    def _circuits_have_sites(self) -> "Study":
        if self.circuits.tasks and len(self.sites) < 2:
            raise ValueError(
                f"circuits.tasks = {self.circuits.tasks} wants dictionaries at two sites or more, and there is one: "
                "give activations.layer as a list, as [5, 15, 25], or take [circuits] out"
            )
        return self

    @property
    def activations(self) -> ActivationSettings:
        """The site that is read; of several, the first."""
        return self.sites[0]

    @property
    def site(self) -> Site:
        """The same by name."""
        return self.named(self.activations)

    def named(self, site: ActivationSettings) -> Site:
        """The name of a site."""
        return Site(self.model.slug, site.hook, site.layer, self.corpus.name)

    def at(self, site: ActivationSettings) -> "Study":
        """The study of that one site, which has no circuits."""
        dictionaries = [dictionary.read_at(site) for dictionary in self.dictionaries]
        return self.model_copy(update={"sites": [site], "dictionaries": dictionaries, "circuits": CircuitSettings()})

    @property
    def first_trainings(self) -> "list[tuple[Study, DictionarySettings]]":
        """The first dictionary of each site, with the study of that site: what circuits are made of."""
        return [(study, study.dictionaries[0]) for study in map(self.at, self.sites)]

    def circuit_slug(self, task: str) -> str:
        """The name of a task's circuit."""
        return f"{self.name}.{task}"

    @property
    def trainings(self) -> "list[tuple[Study, DictionarySettings]]":
        """Every dictionary, each with the study of its one site."""
        return [(study, dictionary) for study in map(self.at, self.sites) for dictionary in study.dictionaries]

    def written(self, dictionary: DictionarySettings) -> ActivationSettings | None:
        """The site that a dictionary writes, where that is another than it reads."""
        d = dictionary.read_at(self.activations)
        return None if d.writes is None or d.writes_layer is None else self.activations.at(d.writes, d.writes_layer)

    @property
    def all_sites(self) -> list[ActivationSettings]:
        """Every site whose activations are wanted, what transcoders write included; each once."""
        written = [study.written(dictionary) for study, dictionary in self.trainings]
        found = {self.named(site): site for site in (*self.sites, *written) if site}
        return list(found.values())

    def spec(self, dictionary: DictionarySettings) -> DictionarySpec:
        """What names a dictionary at the study's site."""
        d, written = dictionary, self.written(dictionary)
        writes = (written.hook, written.layer) if written else None
        return DictionarySpec(self.site, d.architecture, d.d_sae, d.k, d.l1_coefficient, d.variant, writes)


def _reached(site: ActivationSettings) -> tuple[int, int]:
    """When a forward pass comes by."""
    return site.layer, REACHED.index(site.hook)
