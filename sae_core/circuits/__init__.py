"""How features are used: what a prediction owes to each of them, and what becomes of it without them.

    attribution  a difference of two logits, parted among features at tokens; ablations, clamps
    answer       the same with labels, as the command line, the API and the page tell it
    tasks        prompts that ask for one ability, as data
    agreement    does an attribution say what an ablation does?
    network      a model with dictionaries at several sites; graph, faithfulness: the circuit of a task in it
    build        a circuit as an artifact, which `reader` reads; `export`: as an attribution graph
    edit         a task without some nodes of its circuit (`ablate` computes it); shift: a probe without some features

`answer`, `tasks`, `reader` and `edit` are light to import; the others bring torch.
"""
