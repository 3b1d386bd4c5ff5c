"""The report of `gpu`: report.json and report.md, from the files of its parts, and the same tables on stdout."""

import dataclasses
import json

from bench.timing import format_value, print_table
from lab.common import atomic_write


def write_report(args, paths):
    """The report of the parts so far, {part: path}; the samples stay in the files of the parts."""
    parts = {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}
    for part in parts.values():
        for section in part["sections"].values():
            section.pop("samples_s", None)
    report = {"minutes": args.minutes, "settings": dataclasses.asdict(args), "parts": parts}
    with atomic_write(args.out_dir / "report.json", "w") as f:
        json.dump(report, f, default=str, indent=1)
    with atomic_write(args.out_dir / "report.md", "w") as f:
        f.write("\n".join(markdown(report)) + "\n")
    return report


def failures(report):
    """A line for each section that failed and each check that is wrong."""
    for part, found in report["parts"].items():
        if found["status"].startswith("died"):
            yield f"{part}: {found['status']}"
        for name, section in found["sections"].items():
            if section["status"].startswith("failed"):
                yield f"{part}, {name}: {section['status']}"
            for row in section["rows"]:
                if row.get("ok") is False:
                    yield f"{part}, {name}: {row['dtype']}, error {row['error']:.2g}, limit {row['limit']:.2g}"


def notes(report):
    """A line for each section that was not measured."""
    for part, found in report["parts"].items():
        for name, section in found["sections"].items():
            if not section["status"].startswith(("done", "failed")):
                yield f"{part}, {name}: {section['status']}"


def tables(report):
    """(title, rows) of the report; sections of a part with the same columns share a table."""
    parts, targets = report["parts"], []
    yield "parts", [part_row(part, found) for part, found in parts.items()]
    for part, found in parts.items():
        merged = {}
        for name, section in found["sections"].items():
            extra = {} if part in ("machine", "correct", "train") else {"section": name}
            targets += [{"section": name} | target for target in section.get("targets", ())]
            for row in section["rows"]:
                merged.setdefault(tuple(row), []).append(extra | row)
        if part == "correct":
            merged = {"": summed_up([row for rows in merged.values() for row in rows])}
        yield from ((part, rows) for rows in merged.values() if rows)
    if targets and report["settings"]["device"] == "cuda":
        yield "targets", targets


def device_of(report):
    sections = report["parts"].get("machine", {"sections": {}})["sections"]
    versions = sections.get("versions", {"rows": []})["rows"]
    return next((row["value"] for row in versions if row["fact"] == "device"), report["settings"]["device"])


def part_row(part, found):
    states = [section["status"].split(":")[0] for section in found["sections"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return {"part": part, "status": found["status"], "seconds": round(found["seconds"], 1), "sections": counts}


def summed_up(checks):
    """One row per kind of check and type: how many, how many wrong, and the one nearest to its limit."""
    groups = {}
    for check in checks:
        groups.setdefault((check["check"], check["dtype"]), []).append(check)
    worst = {key: max(rows, key=lambda row: row["error"] / row["limit"]) for key, rows in groups.items()}
    return [
        {"check": key[0], "dtype": key[1], "checks": len(rows), "wrong": sum(not row["ok"] for row in rows),
         "worst": worst[key]["name"], "error": worst[key]["error"], "limit": worst[key]["limit"]}
        for key, rows in groups.items()
    ]  # fmt: skip


def markdown(report):
    yield f"# {device_of(report)}, {report['minutes']:g} minutes"
    yield from (f"\n**{line}**" for line in failures(report))
    yield from (f"\n{line}" for line in notes(report))
    for title, rows in tables(report):
        yield f"\n## {title}\n"
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        yield from ("| " + " | ".join(map(format_value, row.values())) + " |" for row in rows)


def print_report(report):
    for title, rows in tables(report):
        print(f"\n{title}")
        print_table(rows)
    for line in (*notes(report), *failures(report)):
        print(line)
