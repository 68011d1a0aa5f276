"""Every statistic of a trace, in one place: pure functions from statistics, or a trace, to a `Table`.

| question | function |
|---|---|
| how much is each expert used? | `usage`, `never_used` |
| how evenly is a layer's load spread? | `balance` |
| how sure is the router, and where? | `confidence` |
| which experts does a domain prefer? | `specialisation`, `preferred`, `mutual_information`, `domain_npmi` |
| which tokens is an expert for? | `vocabulary`, `top_tokens`, `vocabulary_specialisation` |
| which experts come together? | `coactivation`, `affinity`, `affinity_matrices` |
| which experts are alike? | `similarity`, `similarity_matrix` |
| do two models choose alike? | `saturation` |
"""

from moekit.trace.domains import mutual_information, preferred, specialisation
from moekit.trace.overlap import saturation
from moekit.trace.pairs import affinity, affinity_matrices, coactivation, similarity, similarity_matrix
from moekit.trace.usage import balance, confidence, never_used, usage
from moekit.trace.words import domain_npmi, top_tokens, vocabulary, vocabulary_specialisation

__all__ = [
    "affinity",
    "affinity_matrices",
    "balance",
    "coactivation",
    "confidence",
    "domain_npmi",
    "mutual_information",
    "never_used",
    "preferred",
    "saturation",
    "similarity",
    "similarity_matrix",
    "specialisation",
    "top_tokens",
    "usage",
    "vocabulary",
    "vocabulary_specialisation",
]
