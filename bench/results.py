"""Records of benchmarks: kept by device, held against targets, shown in RESULTS.md."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGETS, RESULTS, PAGE = HERE / "targets.toml", HERE / "results", HERE / "RESULTS.md"
Record = dict[str, Any]
COUNTED = ("aot", "roofline")  # whose values are counts with targets, not ratios to another


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured; ``value`` None: it could not be measured."""

    name: str
    value: float | None
    target: str
    met: bool


def verdicts(
    case: str, values: Mapping[str, float | None], targets: Path = TARGETS
) -> list[Verdict]:
    """All targets of ``case`` against ``values``. Raises ValueError for one that is no bound."""
    found = []
    for name, bound in tomllib.loads(targets.read_text(encoding="utf-8")).get(case, {}).items():
        value = values.get(name)
        match bound:
            case {"at_least": limit}:
                met = value is not None and value >= limit
            case {"at_most": limit}:
                met = value is not None and value <= limit
            case _:
                raise ValueError(f"{targets}: [{case}] {name} needs at_least or at_most: {bound}")
        (kind,) = bound
        found.append(Verdict(name, value, f"{kind.replace('_', ' ')} {limit:g}", met))
    return found


def keep(record: Record, results: Path = RESULTS, page: Path = PAGE) -> Path:
    """Append ``record`` to its device's file and write RESULTS.md anew; returns the file."""
    results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", record["device"].lower()).strip("-.")
    path = results / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    page.write_text(markdown(read_all(results)), encoding="utf-8")
    return path


def read_all(results: Path = RESULTS) -> list[Record]:
    """All records of all devices, oldest first."""
    lines = [
        line
        for path in sorted(results.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(map(json.loads, lines), key=lambda record: record["time"])


def record_of(
    case: str,
    where: Mapping[str, Any],
    setting: Mapping[str, Any],
    contenders: Mapping[str, Any],
    values: Mapping[str, Mapping[str, float] | None],
    checks: Sequence[Verdict],
) -> Record:
    """A line of a results file. ``values``: name -> {value, q20, q80, bound}, None: missing."""
    return {
        "bench": case,
        **where,
        "setting": dict(setting),
        "contenders": dict(contenders),
        "values": dict(values),
        "checks": [asdict(check) for check in checks],
    }


def markdown(records: Sequence[Record]) -> str:
    """RESULTS.md: of every device and benchmark the newest record, and then those before it."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `python -m bench`; edit nothing here. Ratios of things measured in one run:",
        "`x_vs_other` is the other's time over fastpref's, `memory_vs_other` fastpref's over the",
        "other's. `bench/results/` holds the records: times, versions, settings.",
    ]
    if not records:
        return "\n".join([*lines, "", "No results yet.", ""])
    for device, case in sorted({(r["device"], r["bench"]) for r in records}):
        own = [r for r in records if (r["device"], r["bench"]) == (device, case)]
        lines += ["", f"## {case}: {device}", "", *_newest(own[-1]), "", "All runs:", ""]
        names = list(own[-1]["values"])
        lines += _table(
            ["time", "commit", "load before", *names],
            [
                [r["time"], _commit(r), f"{r['load_before']:g}"]
                + [_number(r["values"].get(name)) for name in names]
                for r in reversed(own)
            ],
        )
    return "\n".join([*lines, ""])


def _newest(record: Record) -> list[str]:
    checks = {check["name"]: check for check in record["checks"]}
    rows = []
    for name, value in record["values"].items():
        spread = f"{value['q20']:.2f} to {value['q80']:.2f}" if value and "q20" in value else ""
        bound = f"{value['bound']:.2f}" if value and "bound" in value else ""
        check = checks.get(name)
        verdict = f"{check['target']}: {'met' if check['met'] else 'MISSED'}" if check else ""
        rows.append([name, _number(value), spread, bound, verdict])
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    lost = [f"- {text}" for text in losses(record)]
    return [
        f"{record['time']}, commit {_commit(record)}, {record['threads']} threads, load "
        f"{record['load_before']:g} before the start; {versions}.",
        f"Setting: {json.dumps(record['setting'])}",
        "",
        *_table(["ratio", "median", "20 to 80 %", "arithmetic alone", "target"], rows),
        "",
        "What we lose: " + ("nothing of the above." if not lost else ""),
        *lost,
    ]


def ratio_lines(
    values: Mapping[str, Mapping[str, float] | None], checks: Sequence[Verdict]
) -> list[str]:
    """What was measured, a line a value: median, spread, what arithmetic alone gives, target."""
    verdicts, lines = {check.name: check for check in checks}, []
    for name, value in values.items():
        check = verdicts.get(name)
        target = f"target {check.target}: {'met' if check.met else 'MISSED'}" if check else ""
        if value is None:
            lines.append(f"{name:24} not measured                               {target}")
            continue
        spread = f"({value['q20']:.2f} to {value['q80']:.2f})" if "q20" in value else ""
        bound = f"arithmetic alone {value['bound']:.2f}" if "bound" in value else ""
        if "perfect" in value:
            bound += f", of a perfect step {value['perfect']:.2f}"
        lines.append(f"{name:24}{value['value']:6.2f} {spread:16} {bound:24} {target}")
    return lines


def close(
    arguments: argparse.Namespace,
    record: Record,
    checks: Sequence[Verdict],
    *,
    warning: str | None = None,
    missing: Collection[str] | None = None,
) -> int:
    """Keep the record unless `--no_record`, print it as one line; the exit status.

    1 where `--check` was asked for and a target is missed, or a contender is missing.
    """
    if not arguments.no_record:
        print(f"appended to {keep(record).relative_to(HERE.parent)}")
    if warning:
        print(f"warning: {warning}")
    failed = bool(missing) or not all(check.met for check in checks)
    more = {} if missing is None else {"missing": missing}
    print(json.dumps({**record, **more, "ok": not failed}))
    return int(arguments.check and failed)


def losses(record: Record) -> list[str]:
    """What a record shows to fastpref's disadvantage: targets missed, and ratios worse than 1."""
    found = [
        f"{check['name']}: {_number(record['values'].get(check['name']))}, wanted {check['target']}"
        for check in record["checks"]
        if not check["met"]
    ]
    if record["bench"] in COUNTED:
        return found
    for name, value in record["values"].items():
        smaller_is_better = name.startswith("memory") or "_share_" in name
        if value and (value["value"] > 1 if smaller_is_better else value["value"] < 1):
            found.append(f"{name}: {value['value']:.2f} is worse than the other's")
    return found


def _number(value: Mapping[str, float] | None) -> str:
    return f"{value['value']:.2f}" if value else "not measured"


def _commit(record: Record) -> str:
    return f"{(record['commit'] or 'unknown')[:10]}{' (changed)' if record['dirty'] else ''}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
