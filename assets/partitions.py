"""Partitions: a corpus by its name, activations by site, a dictionary and all that follows by dictionary.

The studies are read once, when Dagster loads this code location; after adding a study file, reload it there.
"""

import dagster as dg

from sae_core.studies import Studies, study_folders

STUDIES = Studies.load(*study_folders())

corpora = dg.StaticPartitionsDefinition(sorted(STUDIES.corpora))
sites = dg.StaticPartitionsDefinition(sorted(STUDIES.sites))
dictionaries = dg.StaticPartitionsDefinition(sorted(STUDIES.dictionaries))

corpus_of_site = dg.StaticPartitionMapping({
    corpus: {site for site in STUDIES.sites if STUDIES.corpus_of(site) == corpus} for corpus in STUDIES.corpora
})  # fmt: skip
site_of_dictionary = dg.StaticPartitionMapping({
    site: {d for d in STUDIES.dictionaries if STUDIES.site_of(d) == site} for site in STUDIES.sites
})  # fmt: skip
sites_of_dictionary = dg.StaticPartitionMapping({
    site: {d for d in STUDIES.dictionaries if site in STUDIES.sites_of(d)} for site in STUDIES.sites
})  # fmt: skip
"""With what a transcoder writes."""
corpus_of_dictionary = dg.StaticPartitionMapping({
    corpus: {d for d in STUDIES.dictionaries if STUDIES.corpus_of(STUDIES.site_of(d)) == corpus}
    for corpus in STUDIES.corpora
})  # fmt: skip

circuits = dg.StaticPartitionsDefinition(sorted(STUDIES.circuits))
dictionaries_of_circuit = dg.StaticPartitionMapping({
    dictionary: {c for c in STUDIES.circuits if dictionary in STUDIES.dictionaries_of(c)}
    for dictionary in STUDIES.dictionaries
})  # fmt: skip
sites_of_circuit = dg.StaticPartitionMapping({
    site: {c for c in STUDIES.circuits if site in map(STUDIES.site_of, STUDIES.dictionaries_of(c))}
    for site in STUDIES.sites
})  # fmt: skip
