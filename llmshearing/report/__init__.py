"""What a run leaves for people: `run.jsonl`, a record that grows line by line, and `report.html`, drawn from it."""
