"""Writes these examples' rows: `questions.jsonl` (Alpaca), `chats.jsonl` (ShareGPT), `messy.jsonl` (to be cleaned).

python examples/dropin/make_rows.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
UNITS = [
    ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("kilograms", "grams", 1000), ("litres", "millilitres", 1000),
]  # fmt: skip


def rows() -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Convert {large} to {small}.",
            "input": f"{count} {large}",
            "output": f"{count} {large} are {count * factor} {small}.",
        }
        for large, small, factor in UNITS
        for count in range(2, 10)
    ]


def write(name: str, lines: list[str]) -> None:
    (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


plain = rows()
write("questions.jsonl", [json.dumps(row) for row in plain])
chats = [
    {
        "conversations": [
            {"from": "human", "value": f"{row['instruction']} {row['input']}"},
            {"from": "gpt", "value": row["output"]},
        ]
    }
    for row in plain
]
write("chats.jsonl", [json.dumps(chat) for chat in chats])
messy = [json.dumps(row) for row in plain[:40]]
messy += messy[:6]  # said twice
messy += [json.dumps({**row, "output": ""}) for row in plain[40:44]]  # no answer
messy += [json.dumps({**row, "output": f"  {row['output']} \n"}) for row in plain[44:48]]  # stray spaces
write("messy.jsonl", messy)
