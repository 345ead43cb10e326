"""Write the rows of two recipes again, each with the agent that plays it.

python -m recipes.workplace_and_math.name_agents
"""

import json
from pathlib import Path

SOURCES = {
    "data/workplace_assistant/train.jsonl": ("workplace_assistant.jsonl", "workplace_assistant_simple_agent"),
    "data/dapo17k_aime24/train.jsonl": ("math.jsonl", "math_with_judge_simple_agent"),
}

if __name__ == "__main__":
    out = Path("data/workplace_and_math")
    out.mkdir(parents=True, exist_ok=True)
    for source, (target, agent) in SOURCES.items():
        with Path(source).open() as rows, (out / target).open("w") as written:
            for line in rows:
                row = json.loads(line) | {"agent_ref": {"type": "responses_api_agents", "name": agent}}
                written.write(json.dumps(row) + "\n")
        print(f"{out / target}: rows of {source} for {agent}")
