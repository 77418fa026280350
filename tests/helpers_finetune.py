"""Records of instruction data, and files of them."""

import json


def chat(number):
    return {"messages": [{"role": "user", "content": f"walk {number}"}, {"role": "assistant", "content": "jumps"}]}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
