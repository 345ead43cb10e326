"""Tiny policies for NeMo Gym's own environments, warm-started on what a teacher did in them."""
