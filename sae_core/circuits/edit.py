"""A task without some nodes of its circuit, as the command line, the API and the page tell it. Light: no torch.

As in SHIFT (Marks et al. 2024, 4) a person says which nodes should not matter. They are set to 0 wherever the model
reads, and told is what becomes of the task, on the prompts that played no part in finding the circuit, and of text that
has nothing to do with it; both beside as many other features of the circuit, drawn at random at the same places.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.artifacts import ArtifactStore
from sae_core.circuits.reader import Circuit, NoCircuitError, made_circuit, read_circuit
from sae_core.errors import MindAtlasError
from sae_core.settings import DOCUMENTED
from sae_core.study import Study

if TYPE_CHECKING:
    from sae_core.language_model import LanguageModel

Key = tuple[int, int]
"""A place and a feature; -1 for what the dictionary misses there."""


class EditError(MindAtlasError):
    """Nodes that a circuit does not have."""


@dataclass(frozen=True, slots=True)
class Level:
    """How the model does."""

    __pydantic_config__ = DOCUMENTED

    difference: float
    """Logit of the right token less the other's, in the mean over prompts."""
    right: float
    """Share of the prompts that it gets right."""
    loss: float | None
    """Cross-entropy on held-out text, nats a token; null before any was read."""


@dataclass(frozen=True, slots=True)
class EditedPrompt:
    """One prompt, and its difference of logits as the model is and without the nodes."""

    __pydantic_config__ = DOCUMENTED

    text: str
    target: str
    against: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Edit:
    """What is known so far of a model without some nodes."""

    __pydantic_config__ = DOCUMENTED

    before: Level
    """As the model is. `right` is 1: a circuit is measured on prompts that the model gets right."""
    after: Level
    """Without the nodes."""
    random: list[Level]
    """Without other features, a level for each draw; empty when the circuit has no others."""
    features: int
    """Features that are taken out."""
    errors: int
    """Dictionaries whose errors are taken out; they are in the random draws, too."""
    drawn: int
    """Features of a random draw: fewer where the circuit has fewer others at the same places."""
    prompts: list[EditedPrompt]
    tokens: int
    """Of held-out text that the losses are of."""
    done: int
    """Passes through the model, of `total`."""
    total: int


def edited(
    store: ArtifactStore, study: Study, slug: str, keys: Collection[Key], load: "Callable[[], LanguageModel]"
) -> Iterator[Edit]:
    """What becomes of the task and of held-out text without some nodes: pass by pass, the last one is all of it.

    Args:
        store: where the circuit, its dictionaries and the corpus are.
        study: the study whose circuit it is.
        slug: the circuit's name.
        keys: places and features of nodes of the circuit.
        load: gives the study's language model, in float32.

    Raises:
        NoCircuitError: there is no such circuit, or its dictionaries are others by now.
        EditError: the circuit has no such node.
    """
    circuit = read_circuit(store, slug)
    known = {(node.place, node.feature) for node in circuit.nodes}
    if not keys:
        raise EditError("no node was chosen: name at least one of the circuit")
    if unknown := [key for key in keys if key not in known]:
        raise EditError(f"{slug} has no node {named(circuit, unknown[0])}: choose among the {len(known)} that it has")
    _check_dictionaries(store, slug)
    from sae_core.circuits.ablate import ablate
    from sae_core.circuits.network import Network, places_of

    lm = load()
    network = Network(lm, places_of(store, study, lm.device))
    yield from ablate(network, circuit, store.get("corpus", study.corpus.name).folder, set(keys))


def named(circuit: Circuit, key: Key) -> str:
    """How a node is called: its layer, and its number or `error`."""
    place, feature = key
    at = circuit.places[place].layer if 0 <= place < len(circuit.places) else "?"
    return f"{at}:{'error' if feature < 0 else feature}"


def at_layers(circuit: Circuit, wanted: Sequence[tuple[int, int]]) -> list[Key]:
    """Places and features of nodes that are given by layer and feature. Raises EditError."""
    found = []
    for layer, feature in wanted:
        places = [number for number, place in enumerate(circuit.places) if place.layer == layer]
        if len(places) > 1:
            raise EditError(f"layer {layer} has {len(places)} dictionaries: choose the node on the circuit's page")
        if not places:
            told = ", ".join(str(place.layer) for place in circuit.places)
            raise EditError(f"{circuit.slug} has no dictionary at layer {layer}: there are {told}")
        found.append((places[0], feature))
    return found


def _check_dictionaries(store: ArtifactStore, slug: str) -> None:
    """Features are known by number: those of a dictionary that was trained anew are others."""
    for key, fingerprint in made_circuit(store, slug).manifest.parents.items():
        stage, _, name = key.partition("/")
        now = store.manifest(stage, name)
        if stage == "dictionary" and (now is None or now.fingerprint != fingerprint):
            raise NoCircuitError(f"{slug} is of a dictionary that was made anew since: make the circuit again, too")
