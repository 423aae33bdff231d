"""The tables of `kernels/gpu.sh` from its `gpu.json`.

    report.py gpu.json > gpu.md
    report.py --test       feeds it sample rows and checks what it makes of them

An operation's floor is what the card measured in the same run allows: its floating-point operations at the peak of a large matrix product, or
its bytes at the bandwidth of a large copy, whichever takes longer. Time lost is what it takes beyond that, times how often a step has it.
"""
import json
import sys

# Seconds for 30 steps and pictures a second at 20 steps that the project measures itself by, on an H200.
BARS_30 = [("record", 0.66), ("strong", 0.80), ("good", 1.00), ("pass", 1.47)]
BARS_20 = [("strong", 2.40), ("good", 2.18), ("pass", 1.71)]


def table(head, rows):
    if not rows:
        return ["(no rows)"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def number(value, scale=1.0, digits=2):
    return "" if value is None else f"{value * scale:.{digits}f}"


def section(result, name):
    return next((s["rows"] for s in result["sections"] if s["name"] == name), [])


def part(rows, name):
    return next((row for row in rows if row.get("part") == name), None)


def verdict(section):
    return "FAILED" if not section["ok"] else "not run" if section["note"].startswith("not run") else "ok"


def dtypes(result, kind):
    return [s["name"].split()[1] for s in result["sections"] if s["name"].startswith(kind + " ")]


def limits(result, dtype):
    """Operations and bytes a second of the card."""
    name = "float16" if dtype == "f16" else "bfloat16"
    rows = section(result, "card")
    product = next((r for r in rows if r["part"].startswith("matrix product") and r["part"].endswith(" " + name)), None)
    copy = part(rows, "copy")
    return (product["tflop_per_s"] * 1e12, copy["bytes_per_s"]) if product and copy else None


def operations(result, dtype):
    """Rows of operations, most time lost first, and the sum of a step."""
    peak = limits(result, dtype)
    rows = []
    for row in section(result, f"operations {dtype}"):
        if "bytes" not in row or not peak:
            continue
        floor = max(row["gflop"] * 1e9 / peak[0], row["bytes"] / peak[1])
        lost = (row["seconds"] - floor) * row["per_step"]
        rows.append((lost, floor, row))
    rows.sort(key=lambda entry: -entry[0])
    cells = [
        [row["part"], number(row["seconds"], 1e6, 1), number(floor, 1e6, 1), f"{floor / row['seconds']:.0%}",
         number(row["gflop_per_s"], 1e-3, 0), number(row["bytes"] / row["seconds"], 1e-12), row["per_step"], number(lost, 1e3)]
        for lost, floor, row in rows
    ]
    total = sum(row["seconds"] * row["per_step"] for _, _, row in rows)
    return cells, total


def bar(value, bars, better):
    return next((name for name, limit in bars if better(value, limit)), "none")


def jobs(result, dtype):
    """A row for each stage of the whole jobs."""
    cells, rows = [], section(result, f"jobs {dtype}")
    for row in rows:
        if "part" not in row:
            continue
        note = ""
        if row["part"] == "job, 30 steps":
            note = "bar: " + bar(row["seconds"], BARS_30, lambda have, limit: have <= limit)
        if row["part"] == "job, 20 steps":
            note = f"{1 / row['seconds']:.2f} pictures/s, bar: " + bar(1 / row["seconds"], BARS_20, lambda have, limit: have >= limit)
        if row["part"].endswith("outside the recording"):
            whole = part(rows, row["part"].removesuffix(" outside the recording"))
            if whole and whole["seconds"]:
                note = f"the card waits for {row['seconds'] / whole['seconds']:.1%} of sampling"
        cells.append([row["part"].strip(), number(row["seconds"], 1e3), row.get("launches", ""), number(row.get("peak_bytes"), 1e-9), note])
    return cells


def comparison(result):
    """sdgen beside PyTorch: a step, a decode, 30 and 20 steps."""
    columns = {}
    for dtype in dtypes(result, "jobs"):
        parts, whole = section(result, f"parts {dtype}"), section(result, f"jobs {dtype}")
        step = next((r for r in parts if r.get("part", "").startswith("step, median")), None)
        found = [step, part(parts, "decode"), part(whole, "job, 30 steps"), part(whole, "job, 20 steps")]
        columns[f"sdgen {dtype}"] = found
    for entry in result["sections"]:
        if entry["name"].startswith("PyTorch"):
            names = ["step", "decode", "total of 30 steps", "total of 20 steps"]
            columns[f"{entry['name']} (bf16)"] = [part(entry["rows"], name) for name in names]
    rows = []
    for index, name in enumerate(["UNet step, batch of 2", "VAE decode", "30 steps", "20 steps"]):
        found = [column[index] for column in columns.values()]
        rows.append([name + ", ms"] + [number(row["seconds"], 1e3) if row else "" for row in found])
    peaks = [[row["peak_bytes"] for row in column if row and row.get("peak_bytes")] for column in columns.values()]
    rows.append(["peak memory, GB"] + [number(max(found), 1e-9) if found else "" for found in peaks])
    return table(["", *columns], rows)


def markdown(result):
    lines = ["# sdgen on a card" + (" (dry run: no GPU, tiny sizes, no figure means anything)" if result["dry_run"] else ""), ""]
    lines += table(["machine", "value"], [[key, value] for key, value in result["machine"].items() if value])
    lines += ["", "## Sections", ""]
    rows = [[s["name"], verdict(s), s["seconds"], s["note"].replace("|", "/")] for s in result["sections"]]
    lines += table(["section", "", "seconds", "note"], rows)
    lines += ["", "## sdgen and PyTorch", "", *comparison(result)]
    for dtype in dtypes(result, "jobs"):
        lines += ["", f"## Whole jobs, {dtype}", "", *table(["part", "ms", "launches a step", "peak GB", ""], jobs(result, dtype))]
    for dtype in dtypes(result, "parts"):
        rows = [
            [r["part"], number(r["seconds"], 1e3), number(r["gflop_per_s"], 1e-3), r.get("launches", ""),
             number(r.get("free_before_bytes"), 1e-9), number(r.get("peak_bytes"), 1e-9)]
            for r in section(result, f"parts {dtype}") if "part" in r
        ]
        lines += ["", f"## Parts, {dtype}", "", *table(["part", "ms", "TFLOP/s", "launches", "GB free before", "peak GB"], rows)]
    for dtype in dtypes(result, "operations"):
        cells, total = operations(result, dtype)
        head = ["operation", "us", "floor us", "share", "TFLOP/s", "TB/s", "per step", "ms lost a step"]
        lines += ["", f"## Operations, {dtype}", "", *table(head, cells), "", f"Together {total * 1e3:.2f} ms a step."]
    lines += ["", "## Comparisons with the CPU's f32", ""]
    rows = []
    for entry in result["sections"]:
        for row in entry["rows"]:
            if "check" in row:
                error = "" if row["error"] is None else f"{row['error']:.1e}"
                rows.append([row["check"], entry["name"], error, f"{row['tolerance']:.0e}", "ok" if row["ok"] else "FAILED", row["note"]])
    rows.sort(key=lambda row: row[4] == "ok")
    lines += table(["check", "section", "worst", "allowed", "", "where"], rows)
    return "\n".join(lines) + "\n"


def test():
    """Sample rows: an operation at half its floor's speed, one that is bound by memory, jobs at the bars."""
    card = [
        dict(part="matrix product 8192^3 float16", tflop_per_s=800.0), dict(part="matrix product 8192^3 bfloat16", tflop_per_s=400.0),
        dict(part="copy", bytes_per_s=4e12),
    ]
    product = dict(part="linear", seconds=2e-3, gflop=800.0, gflop_per_s=4e5, bytes=10**6, per_step=10)
    norm = dict(part="layer norm", seconds=3e-3, gflop=0.0, gflop_per_s=0.0, bytes=4 * 10**9, per_step=1)
    whole = [
        dict(part="job, 30 steps", seconds=0.79, launches=900, peak_bytes=8 * 10**9), dict(part="job, 20 steps", seconds=0.5),
        dict(part="  sampling of 30 steps", seconds=0.7), dict(part="  sampling of 30 steps outside the recording", seconds=0.07),
    ]
    names = [("card", card), ("operations f16", [norm, product]), ("jobs f16", whole)]
    sections = [dict(name=name, ok=True, seconds=1.0, note="", rows=rows) for name, rows in names]
    check = dict(check="linear", error=None, tolerance=1e-2, ok=False, note="[1, 2]")
    sections.append(dict(name="verify f16", ok=False, seconds=1.0, note="exit 1", rows=[check]))
    result = dict(machine={}, dry_run=True, sections=sections)
    cells, total = operations(result, "f16")
    # 800 GFLOP at 800 TFLOP/s and 4 GB at 4 TB/s are 1 ms each: lost are 10 * 1 ms and 2 ms.
    assert [row[0] for row in cells] == ["linear", "layer norm"], cells
    assert [row[-1] for row in cells] == ["10.00", "2.00"] and cells[0][3] == "50%", cells
    assert abs(total - 23e-3) < 1e-9, total
    text = markdown(result)
    for piece in ("bar: strong", "2.00 pictures/s, bar: pass", "waits for 10.0% of sampling", "| FAILED |", "Together 23.00 ms"):
        assert piece in text, piece
    print("the table generator passes its test")


if __name__ == "__main__":
    if sys.argv[1:] == ["--test"]:
        test()
    else:
        print(markdown(json.load(open(sys.argv[1]))), end="")
