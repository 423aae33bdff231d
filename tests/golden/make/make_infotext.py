"""Fields of the texts in tests/golden/infotext.txt, read by the pattern A1111 documents for its parameter line.

Standard library only. Writes tests/golden/infotext_fields.json: for each text the prompt, the negative prompt and the pairs.
"""
import json
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent.parent
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def value(text):
    if text.startswith('"') and text.endswith('"'):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def fields(text):
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last)
    parts = {"prompt": [], "negative": []}
    part = "prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "negative", line[len("Negative prompt:") :].strip()
        parts[part].append(line)
    joined = {name: "\n".join(lines) for name, lines in parts.items()}
    return {**joined, "pairs": [[key, value(text)] for key, text in pairs]}


texts = (HERE / "infotext.txt").read_text(encoding="utf-8").rstrip("\n").split("\n====\n")
out = json.dumps([fields(text) for text in texts], ensure_ascii=False, indent=1)
(HERE / "infotext_fields.json").write_text(out + "\n", encoding="utf-8")
