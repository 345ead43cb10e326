"""The policy as a service: the colocated engine and the OpenAI-compatible endpoint in front of it."""
