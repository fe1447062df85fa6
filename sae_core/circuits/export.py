"""A circuit in the format of attribution graphs, as circuit-tracer writes and Neuronpedia's graph view reads it.

`metadata`, `qParams`, `nodes` and `links`; the fields are those of circuit-tracer's `frontend/graph_models.py`, schema
version 1. What a sparse feature circuit has no value for:

    ctx_idx              nodes are over all tokens: all stand at the prompt's last one
    embedding nodes      none: a circuit begins at the first dictionary
    token_prob           of the target after the first prompt; a circuit is of many
    feature_type         "cross layer transcoder" stands for any feature, "mlp reconstruction error" for any error
    influence            the size of the effect, as a share of the largest: no node influence through the whole graph

Where two dictionaries act at one layer, the ids of the second's nodes name its hook, too: there a layer has one.
"""

from typing import Any

import torch

from sae_core.circuits.reader import ERROR, Circuit
from sae_core.language_model import LanguageModel


def attribution_graph(circuit: Circuit, lm: LanguageModel, ids: list[int]) -> dict[str, Any]:
    """The graph; `ids` are the tokens of the prompt that stands for all, the first that found it."""
    _, target, against = circuit.prompts[0]
    at, largest = len(ids) - 1, max((abs(node.effect) for node in circuit.nodes), default=1.0) or 1.0
    token = int(lm.tokenizer(target, add_special_tokens=False).input_ids[0])
    probability = float(lm.last_logits(torch.tensor([ids], device=lm.device))[0, -1].softmax(0)[token])
    output = f"{lm.n_layers + 1}_{token}_{at}"
    stems = _stems(circuit)
    named = {(node.place, node.feature): f"{stems[node.place]}_{node.feature}_{at}" for node in circuit.nodes}
    nodes = [
        {
            "node_id": named[node.place, node.feature],
            "feature": ERROR if node.feature == ERROR else _pair(circuit.places[node.place].layer, node.feature),
            "layer": str(circuit.places[node.place].layer),
            "ctx_idx": at,
            "feature_type": "mlp reconstruction error" if node.feature == ERROR else "cross layer transcoder",
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{stems[node.place]}_{node.feature}-{at if node.feature == ERROR else 0}",
            "clerp": "",
            "influence": abs(node.effect) / largest,
            "activation": None if node.feature == ERROR else node.act,
        }
        for node in circuit.nodes
    ]
    nodes.append({
        "node_id": output, "feature": token, "layer": str(lm.n_layers + 1), "ctx_idx": at, "feature_type": "logit",
        "token_prob": probability, "is_target_logit": True, "run_idx": 0, "reverse_ctx_idx": 0,
        "jsNodeId": f"L_{token}-{at}", "clerp": f'Output "{target}" against "{against}" (p={probability:.3f})',
        "influence": None, "activation": None,
    })  # fmt: skip
    links = [
        {
            "source": named[edge.source_place, edge.source_feature],
            "target": named.get((edge.target_place, edge.target_feature), output),
            "weight": edge.weight,
        }
        for edge in circuit.edges
    ]
    metadata = {
        "slug": circuit.slug.replace(".", "-"), "scan": circuit.places[0].dictionary.split(".resid")[0],
        "transcoder_list": [place.dictionary for place in circuit.places],
        "prompt_tokens": lm.token_strings(ids), "prompt": circuit.prompts[0][0], "node_threshold": None,
        "schema_version": 1,
    }  # fmt: skip
    shown = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": shown, "nodes": nodes, "links": links}


def _stems(circuit: Circuit) -> list[str]:
    """What the ids of each place's nodes begin with: its layer, and its hook where another is at the same layer."""
    layers = [place.layer for place in circuit.places]
    return [
        str(place.layer) if place.layer not in layers[:i] else f"{place.layer}-{place.hook.replace('_', '-')}"
        for i, place in enumerate(circuit.places)
    ]


def _pair(layer: int, feature: int) -> int:
    """Cantor's pairing: one number for two, as circuit-tracer numbers features."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
