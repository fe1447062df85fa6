"""Fixtures that every test may use: a real (tiny, random) language model on disk, a folder of text, a study of both.

The home folder is set before anything is imported: studies are read when `assets.partitions` is.
"""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="mind-atlas-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ["MIND_ATLAS_HOME"] = str(HOME)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin as they wait stall one another on a busy machine

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Rain fell on the old bridge while the river rose below it.",
    "def add(a, b):\n    return a + b",
    "for i in range(10):\n    print(i)",
    "Le pont traverse la rivière, et la ville dort encore.",
    "Les enfants jouent dans le jardin derrière la maison.",
    "El puente cruza el río y la ciudad duerme todavía.",
    "Мост пересекает реку, и город ещё спит.",
    "A planet turns around its star once every long year.",
    "She measured the flour, the sugar and two eggs, then baked the cake.",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


TINY_STUDY = """
description = "A random model of four layers, for tests."
[model]
source = "../models/tiny-llama"
[corpus]
sources = ["../text"]
tokens = 6_000
block_tokens = 32
held_out = 0.2
[activations]
layer = 2
precision = "float32"
shard_tokens = 2048
[dictionary]
d_sae = 64
k = 4
tokens = 20_000
batch_tokens = 256
evaluation_tokens = 512
[feature_map]
min_cluster_size = 3
[labels]
features = 0
embedder = "../models/tiny-embedder"
[checks]
fvu_max = 1.0
dead_max = 1.0
ce_recovered_min = -10.0
l0_tolerance = 0.5
"""
(HOME / "studies").mkdir()
(HOME / "studies" / "tiny.toml").write_text(TINY_STUDY, "utf-8")
YEAR = """
description = "A small real model, made again month by month."
[model]
source = "smollm2-135m-instruct"
[corpus]
sources = ["../year"]
tokens = 200_000
held_out = 0.15
[activations]
layer = 15
[dictionary]
d_sae = 256
k = 16
tokens = 200_000
batch_tokens = 1024
evaluation_tokens = 1024
[feature_map]
min_cluster_size = 3
[steering]
scored = 16
suggested = 0
[labels]
model = "smollm2-135m-instruct"
features = 8
examples = 4
scorers = ["embedding"]
[checks]
fvu_max = 1.0
dead_max = 1.0
labeled_min = 0
label_failures_max = 1
beats_control_min = 0
"""
(HOME / "studies" / "year.toml").write_text(YEAR, "utf-8")
PAIR = TINY_STUDY.replace("k = 4", "k = [3, 5]")
"""Two dictionaries at the tiny study's site."""
(HOME / "studies" / "pair.toml").write_text(PAIR, "utf-8")

CODERS = (
    TINY_STUDY.replace("layer = 2", 'hook = "mlp_in"\nlayer = [0, 2]')
    .replace("[dictionary]", '[dictionary]\narchitecture = "transcoder"')
    .replace("[checks]", "[steering]\nsuggested = 0\nscored = 8\n[checks]")
    .replace("fvu_max = 1.0", "fvu_max = 9.0")
    .replace("ce_recovered_min = -10.0", "ce_recovered_min = -1e9")  # what a random MLP does is not worth much
)
"""Transcoders of the MLPs of two layers."""
(HOME / "studies" / "coders.toml").write_text(CODERS, "utf-8")

CIRCUITS = (
    TINY_STUDY.replace("layer = 2", "layer = [1, 2]").replace("tokens = 20_000", "tokens = 2_000")
    + '[circuits]\ntasks = ["mini"]\nfolder = "../tasks"\nnodes = 12\nsteps = 2\n'
)
"""Two layers, and a task whose prompts a random model gets right about every second time."""
(HOME / "studies" / "tiny-circuits.toml").write_text(CIRCUITS, "utf-8")
SCIENCE = (
    TINY_STUDY.replace("tokens = 6_000", "tokens = 9_000")
    + "[scaling]\nd_sae = [16, 32, 64]\ntokens = [1024, 2048, 4096]\nk = [2, 6]\nlr_factors = [0.5]\n"
    + "evaluation_tokens = 512\nresamples = 20\n[science]\ntokens = 2048\ntwins = 32\nneuron_tokens = 1024\n"
    + 'neuron_features = 16\ncontrol_tokens = 1024\narchitectures = ["batch_top_k", "relu"]\n'
)
"""A sweep of moments, and all of the papers' findings on it."""
(HOME / "studies" / "tiny-science.toml").write_text(SCIENCE, "utf-8")
(HOME / "tasks").mkdir()
_PROMPTS = [
    [" ".join(s.split()[:n]), a, b] for s in SENTENCES[:6] for n in (2, 3) for a, b in ((" the", " a"), (" a", " the"))
]
(HOME / "tasks" / "mini.toml").write_text(
    f'name = "mini"\ndescription = "Anything."\nprompts = {json.dumps(_PROMPTS)}\n', "utf-8"
)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a random 4-layer Llama (d_model 32) with a byte-level BPE of 512 tokens and a chat template."""
    folder = HOME / "models" / "tiny-llama"
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_embedder() -> Path:
    """Folder of a random BERT (d_model 32) that embeds texts without knowing anything of them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder, bert = HOME / "models" / "tiny-embedder", HOME / "models" / "tiny-bert"
    _tokenizer().save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    SentenceTransformer(modules=[Transformer(str(bert)), Pooling(32)], device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def text_folder() -> Path:
    """Folder of sixty small text files in four languages and Python."""
    folder = HOME / "text"
    folder.mkdir()
    for i in range(60):
        first, second = SENTENCES[i % len(SENTENCES)], SENTENCES[(i * 7 + 3) % len(SENTENCES)]
        (folder / f"{i:02d}.txt").write_text(f"Number {i}. {first}\n{second}\n" * 3, "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_study(tiny_model: Path, tiny_embedder: Path, text_folder: Path) -> Path:
    """The study file of the tiny model; its name, and its corpus's, is `tiny`."""
    return HOME / "studies" / "tiny.toml"


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|start|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_atlas(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a store that holds all of the tiny study's stages, made by the pipeline. To be read only."""
    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.run import bring_up_to_date

    root = tmp_path_factory.mktemp("tiny-atlas")
    with dg.DagsterInstance.ephemeral() as instance:
        workshop = Workshop(root=str(root), device="cpu")
        assert list(bring_up_to_date(STUDIES.get("tiny"), workshop, instance, log_level="CRITICAL"))
    return root


@pytest.fixture(scope="session")
def circuit_store(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a store that holds the dictionaries of two layers and a circuit of both. To be read only."""
    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.run import bring_up_to_date, materialize

    root = tmp_path_factory.mktemp("circuits")
    study, workshop = STUDIES.get("tiny-circuits"), Workshop(root=str(root), device="cpu")
    with dg.DagsterInstance.ephemeral() as instance:
        assert list(bring_up_to_date(study, workshop, instance, until="dictionary", log_level="CRITICAL"))
        materialize("circuit", "tiny-circuits.mini", study, workshop, instance, "CRITICAL")
    return root


@pytest.fixture(scope="session")
def reported_atlas(tiny_atlas: Path, circuit_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with reports on it: an audit of two concepts, what texts share across three languages, a circuit."""
    from assets.partitions import STUDIES
    from sae_core.artifacts import ArtifactStore
    from sae_core.atlas import Atlas
    from sae_core.language_model import LanguageModel
    from sae_core.multilingual import Parallel, report_on
    from sae_core.prompt_reader import PromptReader
    from sae_core.safety.audit import build_audit
    from sae_core.study import MultilingualSettings

    root = tmp_path_factory.mktemp("reported-atlas") / "atlas"
    shutil.copytree(tiny_atlas, root)
    for stage in ("circuit", "dictionary", "activations", "corpus"):
        shutil.copytree(circuit_store / stage, root / stage, dirs_exist_ok=True)
    store = ArtifactStore(root)
    (slug,) = store.slugs("features")
    atlas, order = Atlas(store, slug), STUDIES.order(slug, "tiny")
    order = order.override("safety", {"concepts": ["citation_surnames", "power_seeking"]})
    lm = LanguageModel.load(order.study.model, precision="float32")
    store.make(
        order.recipe("safety", slug),
        lambda draft: build_audit(order.study.safety, atlas, lm, draft.parents["steering"].folder, draft.folder),
    )
    begins = {"en": "The old bridge", "fr": "Le pont traverse", "ru": "Мост пересекает"}
    texts = [[f"{begin}: {sentence}" for sentence in SENTENCES] for begin in begins.values()]
    settings = MultilingualSettings(least_languages=2, shuffles=20)
    parallel, reader = Parallel("sentences", [*begins], texts), PromptReader.of(atlas, lm)
    store.make(
        order.recipe("multilingual", slug),
        lambda draft: report_on([parallel], settings, atlas, reader, draft.folder),
    )
    return root
