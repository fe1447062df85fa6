"""How features are used: what a prediction owes to each of them, and what becomes of it without them.

    attribution  a difference of two logits, parted among features at tokens; ablations, clamps
    answer       the same with labels, as the command line, the API and the page tell it
    tasks        prompts that ask for one ability, as data
    agreement    does an attribution say what an ablation does?

`answer` and `tasks` are light to import; the others bring torch.
"""
