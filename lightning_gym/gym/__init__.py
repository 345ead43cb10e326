"""Everything that knows NeMo Gym."""
