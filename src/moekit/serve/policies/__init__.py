"""Which experts stay in memory: one file a policy, one interface for the engine and the simulator.

A policy never loads or frees anything. It is told what is needed, and asked which resident expert gives its place to
one that comes in. One that answers None keeps them all: the newcomer is used and forgotten.
"""

from moekit.serve.policies.base import POLICIES, Key, Policy, Scored, Sizes, policy_named
from moekit.serve.policies.residency import Decision, Residency

__all__ = ["POLICIES", "Decision", "Key", "Policy", "Residency", "Scored", "Sizes", "policy_named"]
