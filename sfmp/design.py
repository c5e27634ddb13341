"""The experimental design: configuration of a tier, its models, runs and knobs, read and validated. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from sfmp.checks import SfmpError
from sfmp.spec import QuantSpec

FP = "fp16"  # the method of the unquantized control rows
SETTINGS = ("bpw", "budget", "group_size", "block_rows", "levels", "reorder", "scope", "objective", "salience")
# Methods that are no QuantSpec, and the settings of a row that each takes; everything else is a knob of its own
# (config/knobs.tsv). A prefix sfmp- means: the same quantizer, mixed widths from SFMP's allocation.
RIVALS = {
    "slim_llm": ("bpw", "budget", "group_size"),
    "amq": ("bpw", "budget", "group_size"),
    "bitstack": ("bpw", "budget"),
    "scalebits": ("bpw", "budget", "group_size", "block_rows", "salience"),
    "efficient_qat": ("bpw", "budget", "group_size"),
    "sfmp-efficient_qat": ("bpw", "budget", "group_size", "block_rows", "salience"),
    "layer_wise": ("bpw", "budget", "group_size", "salience"),
    "element": ("bpw", "budget", "group_size", "salience"),
}


def read_yaml(path: Path) -> dict:
    """Read a YAML mapping; anything else is an error that names the file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SfmpError(f"{path}: cannot be read as YAML ({error}); restore or correct the file") from error
    if not isinstance(value, dict):
        raise SfmpError(f"{path}: expected a mapping of keys, found {type(value).__name__}")
    return value


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a tab-separated table as one dict of text cells per row, every row complete."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader((line for line in file if not line.startswith("#")), delimiter="\t")
            header, *rows = list(reader)
    except (OSError, ValueError) as error:
        raise SfmpError(f"{path}: expected a tab-separated table with a header, found {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise SfmpError(
                f"{path}, row {number} ({row[0] if row else 'empty'}): expected {len(header)} cells, found "
                f"{len(row)}; separate cells by one tab"
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def validate(value: Mapping, schema: Mapping, where: str) -> None:
    """Check one mapping against a JSON schema.

    Raises
    ------
    SfmpError
        Naming `where` (file and row), the column or key, what was expected and what was found.
    """
    from jsonschema import Draft202012Validator

    for error in sorted(
        Draft202012Validator(schema).iter_errors(value), key=lambda e: [str(p) for p in e.path]
    ):
        key = ".".join(str(part) for part in error.path)
        expected = error.schema.get("enum") or error.schema.get("pattern")
        detail = (
            f"expected {'one of ' if 'enum' in error.schema else 'text like '}{expected}, found "
            f"{error.instance!r}"
            if expected
            else error.message
        )
        raise SfmpError(f"{where}{', ' + key if key else ''}: {detail}")


class Design:
    """The validated configuration of one tier: `config`, `models`, `datasets` and `runs` (name → row), `quantized`
    runs, those of them that a method of :data:`RIVALS` makes, and `knobs` (method → knob → value) as the configuration
    asks.

    The `source` of a model is ``owner/name@revision`` once its revision is known, `repository` is without it.

    Raises
    ------
    SfmpError
        Naming file, row and column of the first thing that is wrong.
    """

    def __init__(self, config: Mapping, folder: Path):
        folder = Path(folder)
        tiers = sorted(path.stem for path in (folder / "tiers").glob("*.yaml"))
        tier = config.get("tier")
        if tier not in tiers:
            raise SfmpError(
                f"config, tier: expected one of {', '.join(tiers)}, found {tier!r}; "
                "use e.g. --config tier=embedded"
            )
        self.folder = folder
        self.config = {**read_yaml(folder / "tiers" / f"{tier}.yaml"), **config}
        validate(
            self.config, read_yaml(folder / "schemas" / "config.schema.yaml"), f"configuration of tier {tier}"
        )
        self.tier, self.results = tier, f"results/{tier}"
        every_model = self._table("models", "model")
        for row in every_model.values():
            row["repository"] = row["source"]
            row["source"] += f"@{row['revision']}" if row["revision"] != "-" else ""
        self.datasets = self._table("datasets", "dataset")
        # A file of their own: rows of other tiers must not make the tables of the embedded one stale.
        table = "runs" if tier == "embedded" else "runs_hub"
        self.runs_table = str(folder / f"{table}.tsv")
        every_run = self._table(table, "run")
        for name, row in every_run.items():
            where = f"{self.runs_table}, row {name}"
            if row["model"] not in every_model:
                raise SfmpError(
                    f"{where}, model: expected one of {', '.join(every_model)}, found {row['model']!r}"
                )
            if not name.startswith(f"{row['model']}.{row['method']}"):
                raise SfmpError(
                    f"{where}, run: expected a name that starts with {row['model']}.{row['method']}, "
                    f"found {name!r}"
                )
            self._check_settings(where, row)
        self.models = {name: row for name, row in every_model.items() if row["tier"] == tier}
        self.runs = {name: row for name, row in every_run.items() if row["model"] in self.models}
        self.quantized = [name for name, row in self.runs.items() if row["method"] != FP]
        self.rivals = [name for name in self.quantized if self.runs[name]["method"] in RIVALS]
        self.planned = [name for name in self.quantized if name not in self.rivals]  # by a QuantSpec
        self.knobs = self._knobs(self.config["knobs"])
        if self.config["showcase"] not in self.planned:
            raise SfmpError(
                f"configuration of tier {tier}, showcase: expected a run of runs.tsv that SFMP plans, found "
                f"{self.config['showcase']!r}"
            )

    def _table(self, name: str, key: str) -> dict[str, dict[str, str]]:
        path = self.folder / f"{name}.tsv"
        schema = read_yaml(self.folder / "schemas" / f"{name.removesuffix('_hub')}.schema.yaml")
        rows = {}
        for row in read_table(path):
            validate(row, schema, f"{path}, row {row.get(key)}")
            if row[key] in rows:
                raise SfmpError(
                    f"{path}, row {row[key]}, {key}: listed twice; every {key} needs a name of its own"
                )
            rows[row[key]] = row
        return rows

    def _knobs(self, column: str) -> dict[str, dict]:
        """Method → knob → value, from one column of knobs.tsv."""
        path, found = self.folder / "knobs.tsv", {}
        schema = read_yaml(self.folder / "schemas" / "knobs.schema.yaml")
        for row in read_table(path):
            where = f"{path}, row {row.get('method')} {row.get('knob')}"
            validate(row, schema, where)
            values = found.setdefault(row["method"], {})
            if row["knob"] in values:
                raise SfmpError(f"{where}: listed twice; a method has one knob of a name")
            try:
                values[row["knob"]] = {name: json.loads(row[name]) for name in ("full", "embedded")}[column]
            except ValueError as error:
                raise SfmpError(f"{where}: expected JSON values, found {error}") from error
        return found

    @staticmethod
    def _check_settings(where: str, row: Mapping[str, str]) -> None:
        method = row["method"]
        used = () if method == FP else RIVALS.get(method, SETTINGS)
        for name in SETTINGS:
            if name in used and row[name] == "-":
                raise SfmpError(f"{where}, {name}: expected a value, found -; {method} rows need it")
            if name not in used and row[name] != "-":
                raise SfmpError(f"{where}, {name}: expected -, found {row[name]!r}; {method} rows do not use it")
        try:
            if method in RIVALS:
                rival_settings(row)
            elif method != FP:
                run_spec(row)
        except SfmpError as error:
            raise SfmpError(f"{where}, {error}") from error

    @property
    def showcase(self) -> str:
        return self.config["showcase"]

    @property
    def showcase_model(self) -> str:
        return self.runs[self.showcase]["model"]

    def weights(self, model: str) -> list[str]:
        """Files of the repository that hold a model's weights: inputs of whatever reads the model."""
        folder = Path(self.models[model]["files"])
        return sorted(str(path) for path in folder.glob("*") if path.is_file()) if folder.name != "-" else []

    def with_experiment(self, word: str) -> list[str]:
        """Runs of this tier that take part in an experiment."""
        return [name for name, row in self.runs.items() if word in row["experiments"].split(",")]


def load_design(config: Mapping, folder: Path | str = "config") -> Design:
    """Validate the configuration and return the design of the chosen tier."""
    return Design(config, Path(folder))


def run_spec(row: Mapping[str, str]) -> QuantSpec:
    """Return the specification of a quantized row of runs.tsv."""
    levels = row["levels"] if row["levels"] == "auto" else [int(level) for level in row["levels"].split(",")]
    return QuantSpec.from_dict(
        {
            "bpw": float(row["bpw"]),
            "group_size": int(row["group_size"]),
            "block_rows": int(row["block_rows"]),
            "levels": levels,
            "reorder": "both" if row["reorder"] == "shared" else row["reorder"],
            "shared_columns": row["reorder"] == "shared",
            "method": row["method"].rpartition("-")[2],
            "scope": row["scope"],
            "objective": row["objective"],
            "seed": int(row["seed"]),
        }
    )


def rival_settings(row: Mapping[str, str]) -> dict:
    """Return the keywords that a row of :data:`RIVALS` gives its method: `bpw` and what is not blank; the salience
    is a file.

    Raises
    ------
    SfmpError
        If the budget, the group size or the rows of a block are impossible.
    """
    settings = {"bpw": float(row["bpw"])}
    settings |= {key: int(row[key]) for key in ("group_size", "block_rows") if row[key] != "-"}
    # Only BitStack is told its bytes; a rival of codes would have to search for the bpw that fits them.
    budget = "stored" if row["method"] == "bitstack" else "bpw"
    if row["budget"] != budget:
        raise SfmpError(f"budget: expected {budget} for {row['method']}, found {row['budget']!r}")
    if row["method"] == "amq" and settings["group_size"] != 128:
        raise SfmpError(f"group_size: expected 128 for amq, as its one search has, found {row['group_size']}")
    if "group_size" in settings:  # the same bounds as those of a QuantSpec
        shape = {"block_rows": 1, **settings}
        QuantSpec(**shape, levels=tuple(range(1, 9)))
    elif not 1 <= settings["bpw"] <= 16:
        raise SfmpError(f"bpw: expected 1..16, found {settings['bpw']:g}")
    return settings
