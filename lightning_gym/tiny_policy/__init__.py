"""A policy of less than a million parameters, warm-started to a starting reward that is known in advance."""
