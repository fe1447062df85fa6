"""How far a label can be believed: what one can tell with it on text that its writer never saw.

    items       the texts: where the feature fires, over its levels, and where it does not, in three strata
    metrics     AUC, which is balanced accuracy where the answers are yes and no, and what the bootstrap says of it
    embedding   similarity of label and text, by a sentence-embedding model; asks nobody
    nearest     the texts that read most alike, by FAISS over these embeddings
    judge       detection, fuzzing, specificity, simulation: what a language model is asked about the texts
    yes_no      detection and fuzzing of one text at a time, by a small model
    simulation  the values that it expects on each token, read from log-probabilities
    score       all of it for many features, beside what another's label and the lexical one get

What comes of it is `Score`, in the rows of `Labels`.
"""
