"""How far a label can be believed: what one can tell with it on text that its writer never saw.

    items       the texts: where the feature fires, over its levels, and where it does not, in three strata
    metrics     balanced accuracy, AUC, and what the bootstrap says of both
    embedding   similarity of label and text, by a sentence-embedding model; asks nobody
    nearest     the texts that read most alike, by FAISS over these embeddings
    judge       detection, fuzzing, specificity, simulation: what a language model is asked about the texts
    simulation  the values that it expects on each token, read from log-probabilities
    score       all of it for many features, beside what another's label and the lexical one get

What comes of it is `Score`, in the rows of `Labels`.
"""
