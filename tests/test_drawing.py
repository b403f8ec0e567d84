"""Both graphs as rows and lanes, and as DOT."""

import itertools

import pydot
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from fxfuse import zoo
from fxfuse.dot import dot
from fxfuse.drawing import Drawing, Node, Row, drawing
from tests.forms import EXPORT_WARNING, Forward
from tests.support import randomise

# pydot calls pyparsing by names that are going.
READING_DOT = pytest.mark.filterwarnings("ignore:.*deprecated - use:DeprecationWarning")
X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def drawn(model, inputs=None):
    fused = fxfuse.fuse(model)
    return drawing(model, fused, fxfuse.report(fused), inputs)


def chain():
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))


def states(found):
    return [(row.name, row.state) for row in found.rows]


def assert_well_laid_out(found):
    """Every node reads earlier rows, and no value runs through the node of another."""
    for side in ("before", "after"):
        nodes = {number: getattr(row, side) for number, row in enumerate(found.rows) if getattr(row, side)}
        for number, node in nodes.items():
            for source in node.inputs:
                assert source < number
                between = [nodes[row].lane for row in range(source + 1, number) if row in nodes]
                assert nodes[source].lane not in between


def test_every_node_has_a_row_and_a_state():
    found = drawn(chain(), (X,))
    assert states(found) == [
        ("input_1", "same"), ("0", "folded"), ("1", "gone"), ("2", "same"), ("3", "left"), ("output", "same"),
    ]  # fmt: skip
    assert [row.after is None for row in found.rows] == [False, False, True, False, False, False]
    assert [row.before.operator for row in found.rows] == [
        "input", "Conv2d", "BatchNorm2d", "ReLU", "BatchNorm2d", "output",
    ]  # fmt: skip
    assert [row.shape for row in found.rows[:2]] == ["2×3×8×8", "2×4×6×6"]
    # What read the norm reads the convolution.
    assert (found.rows[3].before.inputs, found.rows[3].after.inputs) == ((2,), (1,))


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_is_drawn_with_the_names_of_its_modules(decomposed):
    program = torch.export.export(chain(), (X,))
    found = drawn(program.run_decompositions() if decomposed else program)
    tuples = {"getitem", "getitem_3"}
    named = [(name, state) for name, state in states(found) if name not in tuples]
    assert named == [
        ("input", "same"), ("0", "folded"), ("1", "gone"), ("relu", "same"), ("3", "left"),
        ("output", "same"),
    ]  # fmt: skip
    assert found.rows[0].shape == "2×3×8×8"
    assert {state for name, state in states(found) if name == "getitem"} <= {"gone"}


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_output_that_keeps_its_name_is_still_the_operator_that_makes_it(decomposed):
    program = torch.export.export(chain()[:2], (X,))
    found = drawn(program.run_decompositions() if decomposed else program)
    assert [row.name for row in found.rows if row.state == "folded"] == ["0"]
    assert "1" in [row.name for row in found.rows if row.state == "gone"]
    assert not [row for row in found.rows if row.state == "new"]


def test_functions_and_norms_written_out_have_the_names_of_their_tensors():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = Forward(
        lambda self, x: F.batch_norm(
            F.conv2d(x, self.conv.weight, self.conv.bias),
            self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias,
        ),
        conv=layers[0], bn=layers[1],
    )  # fmt: skip
    known = [(name, state) for name, state in states(drawn(randomise(model))) if state != "new"]
    assert known == [("x", "same"), ("conv", "folded"), ("bn", "gone"), ("output", "same")]


def test_what_the_folded_graph_asserts_is_new():
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    inputs = (torch.randn(2, 3, dtype=torch.float64),)
    fused = fxfuse.fuse(model, example_inputs=inputs)
    found = drawing(model, fused, fxfuse.report(fused), inputs)
    new = [row for row in found.rows if row.state == "new"]
    assert new and all(row.before is None for row in new)
    assert_well_laid_out(found)


def test_without_a_graph_there_is_no_drawing():
    model = Forward(lambda self, x: self.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(3, 3, 1)).eval()
    assert drawn(model) is None
    turned = Forward(lambda self, x: self.conv(x).transpose_(2, 3), conv=nn.Conv2d(3, 3, 1)).eval()
    assert drawn(fx.symbolic_trace(turned)) is None


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "shufflenet_v2_x0_5"])
def test_real_networks_are_well_laid_out_and_account_for_every_norm(name):
    model = zoo.load(f"torchvision:{name}").model
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    found = drawing(model, fused, report, None)
    assert_well_laid_out(found)
    folded, refused = {fold.norm for fold in report.folded}, {refusal.norm for refusal in report.refused}
    assert {row.name for row in found.rows if row.state == "gone"} == folded
    assert {row.name for row in found.rows if row.state == "left"} == refused
    into = {each for fold in report.folded for each in fold.into}
    assert {row.name for row in found.rows if row.state == "folded"} == into
    read = set(itertools.chain(*(row.after.inputs for row in found.rows if row.after)))
    assert {number for number, row in enumerate(found.rows) if row.after} - read == {len(found.rows) - 1}


def test_a_chain_has_one_lane_and_a_branch_has_its_own():
    model = Forward(lambda self, x: x + self.conv(x).relu(), conv=nn.Conv2d(3, 3, 1)).eval()
    found = drawn(model)
    assert [(row.name, row.before.lane) for row in found.rows] == [
        ("x", 0), ("conv", 1), ("relu", 1), ("add", 0), ("output", 0),
    ]  # fmt: skip
    assert {row.before.lane for row in drawn(chain()).rows} == {0}


@READING_DOT
def test_dot_can_be_read_and_has_every_node_and_edge():
    found = drawn(chain())
    (graph,) = pydot.graph_from_dot_data(dot(found))
    before, after = graph.get_subgraphs()
    assert [(len(part.get_nodes()), len(part.get_edges())) for part in (before, after)] == [(6, 5), (5, 4)]
    assert ("before_1", "before_2") in {(e.get_source(), e.get_destination()) for e in before.get_edges()}
    assert 'label="BatchNorm2d\\n1\\n"' in dot(found)


@READING_DOT
def test_no_name_ends_a_string_of_dot():
    name = 'a"];evil[label="\\'
    node = Node("Conv2d", name, 0, ())
    text = dot(Drawing((Row("same", "", "", node, node),)))
    (graph,) = pydot.graph_from_dot_data(text)
    assert [len(part.get_nodes()) for part in graph.get_subgraphs()] == [1, 1]
    assert 'a\\"];evil[label=\\"\\\\' in text
