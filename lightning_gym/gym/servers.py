"""What a Gym is to the trainer: something that is started with the policy's address and knows its head server."""

from pathlib import Path
from typing import Protocol


class Gym(Protocol):
    """A Gym that plays against our endpoint."""

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        """Start it, or attach to it, and wait until it answers.

        Args:
            policy_url: our endpoint, ending in ``/v1``.
            api_key: its bearer token.
            model: the name to ask it for.
            run_dir: where logs go.

        Returns:
            The head server's URL.

        Raises:
            GymStartError: it did not come up.
        """
        ...

    def close(self) -> None:
        """Stop what `start` started; bounded, idempotent."""
        ...
