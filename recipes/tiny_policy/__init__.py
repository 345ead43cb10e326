"""A policy of less than a million parameters, warm-started to a starting reward that is known in advance."""

from recipes.tiny_policy.build import TinyPolicy, ensure_tiny_policy, read_record

__all__ = ["TinyPolicy", "ensure_tiny_policy", "read_record"]
