"""``report.schema.json`` describes all that is written as JSON, and nothing else."""

import copy
import json
from dataclasses import fields
from importlib import resources

import pytest
import torch
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from torch import nn

import fxfuse
from fxfuse import cli
from fxfuse.lowering.records import Lowering, Timing
from fxfuse.records import SCHEMA, Apart, Fold, Merged, Refusal, Report
from fxfuse.verdict import Comparison, Worst
from tests.support import randomise

DOCUMENT = json.loads(resources.files("fxfuse").joinpath("report.schema.json").read_text(encoding="utf-8"))
DEFINITIONS = DOCUMENT["$defs"]
OBJECTS = {name: each for name, each in DEFINITIONS.items() if each.get("type") == "object"}
# What a record has on paper and not in its dataclass.
ADDED = {Report: {"schema", "norms"}}


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


class Branches(nn.Module):
    """Of these convolutions two become one, and one stays."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.far = nn.Conv2d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.one(x) + self.two(x) + self.far(x)


def network():
    """A norm that is folded, one that is left, a constant, branches that are merged and some that are not."""
    layers = (nn.Conv2d(3, 4, 3), Scaled(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), Branches())
    return randomise(nn.Sequential(*layers)).float()


def violations(record, name=""):
    part = {"$ref": f"#/$defs/{name}"} if name else {"oneOf": DOCUMENT["oneOf"]}
    return [
        error.message for error in Draft202012Validator({"$defs": DEFINITIONS} | part).iter_errors(record)
    ]


def written(command, *arguments):
    invoked = ["tests.test_schema:network", "--json", "-", *arguments]
    result = CliRunner().invoke(cli.main, [command, *invoked])
    return json.loads(result.stdout, parse_constant=pytest.fail)


INPUT = ("--input", "2,3,8,8")
DOCUMENTS = {
    "fuse with an input": ("fuse", lambda: written("fuse", *INPUT)),
    "fuse without": ("fuse", lambda: written("fuse")),
    "fuse and lower": ("fuse", lambda: written("fuse", *INPUT, "--lower")),
    "explain": ("explain", lambda: written("explain")),
    "verify": ("verify", lambda: written("verify", *INPUT)),
    "verify with a candidate": ("verify", lambda: written("verify", "torchvision:alexnet", *INPUT)),
    "report": ("Report", lambda: json.loads(fxfuse.explain(network()).to_json())),
    "report of numbers that are none": ("Report", lambda: json.loads(without_numbers().to_json())),
}


def without_numbers():
    nan, inf = torch.nan, torch.inf
    comparison = Comparison(
        ok=False,
        conclusive=True,
        max_abs=inf,
        max_rel=inf,
        reference_error=nan,
        candidate_error=nan,
        worst=Worst("", (0, 1), nan, -inf, inf),
    )
    return Report("Net", (), (), verification=comparison)


def test_the_schema_is_valid_and_carries_its_version():
    Draft202012Validator.check_schema(DOCUMENT)
    assert DOCUMENT["$id"] == f"urn:fxfuse:json:{SCHEMA}"
    assert DEFINITIONS["schema"]["const"] == SCHEMA


@pytest.mark.parametrize(
    "record",
    [Fold, Merged, Apart, Refusal, Worst, Comparison, Report, Lowering, Timing],
    ids=lambda kind: kind.__name__,
)
def test_schema_has_the_fields_of_the_record(record):
    expected = {field.name for field in fields(record)} | ADDED.get(record, set())
    assert {*OBJECTS[record.__name__]["properties"]} == expected


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_closed_and_everything_in_them_is_described(name):
    description = OBJECTS[name]
    assert description["additionalProperties"] is False
    assert sorted(description["required"]) == sorted(description["properties"])
    for each in (description, *description["properties"].values()):
        target = DEFINITIONS[each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        assert target["description"].endswith(".")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_written_follows_the_schema(document):
    name, write = DOCUMENTS[document]
    record = write()
    assert not violations(record, name) and not violations(record)
    assert all(
        violations(record, other) for other in ("fuse", "explain", "verify", "Report") if other != name
    )


def test_the_documents_hold_every_kind_of_record():
    report = written("fuse", *INPUT)["report"]
    assert report["folded"] and report["refused"] and report["constants"]
    assert report["verification"]["worst"] is not None


@pytest.mark.parametrize("document", ["fuse with an input", "verify"])
def test_a_field_too_many_or_too_few_is_seen_wherever_it_is(document):
    name, write = DOCUMENTS[document]
    record = write()
    places = [*objects(record)]
    assert len(places) > 2
    for number, place in enumerate(places):
        longer = copy.deepcopy(record)
        [*objects(longer)][number]["undocumented"] = 1
        assert violations(longer, name)
        for field in place:
            shorter = copy.deepcopy(record)
            del [*objects(shorter)][number][field]
            assert violations(shorter, name), field


def objects(value):
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)
