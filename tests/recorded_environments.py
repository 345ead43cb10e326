"""The environments of `gym_samples`, as far as the recorded rollouts touch them; the server process imports this."""

from lightning_gym.gym.environments import Environment, last_text, tool


class Weather(Environment):
    name = "example_single_tool_call"

    @tool
    def get_weather(self, city: str) -> dict[str, str]:
        return {"city": city, "weather_description": f"The weather in {city} is cold."}

    def verify(self, response):
        return 1.0


class Synonyms(Environment):
    name = "example_multi_step"

    @tool
    def get_synonym_value(self, synonym: str) -> dict[str, int]:
        terms = self.task["expected_synonyms"]
        return {"synonym_value": self.task["expected_synonym_values"][terms.index(synonym)]}

    @tool
    def extract_synonym_values(self, synonym_values: list[int]) -> dict[str, bool]:
        self.parsed = synonym_values
        return {"success": True}

    def verify(self, response):
        return float(self.parsed == self.task["expected_synonym_values"])

    def report(self):
        return {
            "parsed_synonym_values": self.parsed,
            "accuracy": True,
            "set_overlap": 1.0,
            "original_term_minefield_hit": False,
            "order_instruction_following_failure": False,
        }


class TinyCopy(Environment):
    name = "tiny_copy"

    def verify(self, response):
        return last_text(response).count(self.task["target_char"]) / len(last_text(response))

    def report(self):
        return {"target_char": self.task["target_char"], "n_chars": 27}


class Broken(Environment):
    name = "broken"

    def __init__(self, row):
        super().__init__(row)
        if "refuse" in row:
            raise KeyError("no such thing")

    @tool
    def divide(self, by: int) -> float:
        return 1 / by

    def verify(self, response):
        if "reward" in self.task:
            return float(self.task["reward"])
        raise ValueError("no verdict")


class Unfinished(Environment):
    name = "unfinished"
