"""Why a norm or branches can be left: one code for each reason, with what it means and what can be done.

``refusals.md``, beside this file, explains each at length; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Explanation:
    """What is true of every refusal with one code."""

    code: str
    reason: str
    hint: str


class Code(Enum):
    """The refusal codes.

    1xx: place; 2xx: the norm; 3xx: the operator; 4xx: numbers; 5xx: kept modules; 6xx: wishes;
    7xx: branches that stay several operators.
    """

    OTHER_USERS = Explanation(
        "FXF101",
        "the value that it normalises is used elsewhere too",
        "the other user needs the value as it was before the norm; nothing to do",
    )
    OPAQUE_PRODUCER = Explanation(
        "FXF102",
        "what it normalises does not come out of a linear operator",
        "put the norm directly after the convolution or linear layer, if the model allows it",
    )
    NOTHING_BEFORE = Explanation(
        "FXF103",
        "it normalises an input of the model",
        "nothing to do: its map could only go into the operators after it, which cannot take it",
    )
    AXIS = Explanation(
        "FXF104",
        "it normalises another axis than the operator's channels",
        "check that this is what the model means; if it is, the norm has to stay",
    )
    RANK_UNKNOWN = Explanation(
        "FXF105",
        "its input may have two axes or more, and which one it normalises depends on that",
        "pass example_inputs=... (--input), from which it is read; modules that are kept cannot assert it",
    )
    CHANNELS = Explanation(
        "FXF106",
        "it has another number of channels than the operator before it",
        "the model cannot run as it is; check num_features",
    )
    NORM_BEFORE_LEFT = Explanation(
        "FXF107",
        "the norm before it is left, and stands between it and the operator",
        "see the refusal of the norm before it",
    )
    MIXED = Explanation(
        "FXF108",
        "an operator between it and the linear operator mixes the channels, or may",
        "normalise before it; or write a reshape with the sizes of its input: view(x.shape[0], 8, -1)",
    )
    LAYOUT = Explanation(
        "FXF109",
        "without it a value would lie in memory in an order that the code after it may not accept",
        "write reshape instead of view, or call contiguous() before the norm",
    )
    RESHAPED = Explanation(
        "FXF110",
        "an operator changes the shape of a tensor in place, after which no shape in the graph is certain",
        "write transpose, squeeze, ... instead of transpose_, squeeze_, ...",
    )
    GRADIENTS = Explanation(
        "FXF111",
        "the graph is to give gradients of its parameters, which do not get through a fold",
        'call the model under torch.no_grad(), or compile it with options={"refold": "always"}',
    )
    PRESERVED = Explanation(
        "FXF112",
        "it and the operator are in modules whose calls the export preserves, and one may be exchanged",
        "export without preserve_module_call_signature for one of them, or fold the model before the export",
    )
    BATCH_STATISTICS = Explanation(
        "FXF201",
        "it has no running statistics and normalises by those of the batch",
        "train it with track_running_stats=True",
    )
    NORM_TRAINING = Explanation(
        "FXF202",
        "it is in training mode and normalises by the statistics of the batch",
        "call model.eval(), which reaches every submodule",
    )
    NORM_HOOKS = Explanation(
        "FXF203",
        "it carries hooks, which would no longer run",
        "remove the hooks from the norm before folding",
    )
    NORM_OWN_FORWARD = Explanation(
        "FXF204",
        "its class or instance replaces torch.nn's forward and cannot be traced through",
        "use torch.nn's norm, or write the forward without control flow on values",
    )
    NORM_COMPUTED = Explanation(
        "FXF205",
        "its statistics or parameters are computed from the input, or are no plain real tensors",
        "store them as buffers or parameters",
    )
    STATE_MUTATED = Explanation(
        "FXF206",
        "a tensor that would be folded is written to in forward",
        "a folded tensor could not follow; keep it constant in eval mode",
    )
    TUPLE_OUTPUT = Explanation(
        "FXF207",
        "it is a native batch norm, and what it returns besides the normalised value is read",
        "read the first of its values only",
    )
    INSIDE_OPAQUE = Explanation(
        "FXF208",
        "it is inside a module or function that is called as a whole",
        "remove the hooks from that module, or call the norm from a forward that can be traced",
    )
    UNTRACED = Explanation(
        "FXF209",
        "it is called by a forward that cannot be traced, so it is not known what it normalises",
        "move the norm and its convolution into a module of their own, with a forward without control flow",
    )
    EXPOSED = Explanation(
        "FXF210",
        "a forward that cannot be traced does more than call the module that it is in",
        "let that forward only call the module",
    )
    OPERATOR_HOOKS = Explanation(
        "FXF301",
        "the operator before it carries hooks, which would see the folded output",
        "remove the hooks from the operator before folding",
    )
    OPERATOR_OWN_FORWARD = Explanation(
        "FXF302",
        "the operator before it replaces torch.nn's forward and cannot be traced through",
        "use torch.nn's layer, or write the forward without control flow on values",
    )
    OPERATOR_COMPUTED = Explanation(
        "FXF303",
        "the weight of the operator before it is computed in forward, or is no plain real tensor",
        "make it a parameter, for example with torch.nn.utils.parametrize.remove_parametrizations",
    )
    OPERATOR_TRAINING = Explanation(
        "FXF304",
        "the operator before it is in training mode",
        "call model.eval(), which reaches every submodule",
    )
    PADDING = Explanation(
        "FXF305",
        "zeros are padded, or sums taken, between it and the operator, and its shift is not zero",
        "put the norm next to the operator before it, repeat pixels instead of zeros, or take a mean",
    )
    NEGATIVE_SCALE = Explanation(
        "FXF306",
        "it comes after a maximum, and turns the order round in channels with a negative weight",
        "normalise before the pooling",
    )
    OVERFLOW = Explanation(
        "FXF401",
        "the folded weight or bias would be infinite or NaN in its dtype",
        "mend the statistics, or keep the model in float32 or bfloat16, which have a wider range",
    )
    UNDERFLOW = Explanation(
        "FXF402",
        "the folded weight of a channel would be too small for its dtype and lose its digits",
        "keep the model in float32 or bfloat16, which hold smaller numbers",
    )
    CHECK = Explanation(
        "FXF403",
        "the folded operator did not give what the operators of the source gave, so the fold was undone",
        "this is a mistake of fxfuse, or of the machine: please report it, with the model",
    )
    SHARED = Explanation(
        "FXF501",
        "modules are kept, and it or the operator is called more than once, or read elsewhere",
        "leave out keep_modules=True if it was given, or give each call a module of its own",
    )
    NO_MODULE = Explanation(
        "FXF502",
        "modules are kept, and it or the operator is no module of its own that could be exchanged",
        "leave out keep_modules=True if it was given, or call the norm and the operator as modules",
    )
    OPTIONS = Explanation(
        "FXF503",
        "modules are kept, and whether it follows the operator depends on the arguments of forward",
        "nothing to do: the norm is needed for some of the calls that forward allows",
    )
    METHODS = Explanation(
        "FXF504",
        "modules are kept, and a method other than forward gives the value between it and the operator",
        "leave out keep_modules=True if it was given, or call the norm and the operator in one method",
    )
    KEPT_BRANCHES = Explanation(
        "FXF505",
        "modules are kept, and its branch could only become a part of the operator of another one",
        "leave out keep_modules=True to have the branches merged",
    )
    ASKED = Explanation(
        "FXF601",
        "it was asked to be left",
        "take it out of leave=... to have it folded",
    )
    BRANCHES = Explanation(
        "FXF701",
        "no branch has a kernel that could hold those of the others",
        "give one of them the stride, groups and dilation of all, and taps wherever the others have some",
    )
    COST = Explanation(
        "FXF702",
        "one operator in the place of these branches would cost more than they do",
        "nothing to do: the branches are the faster form",
    )
    KINDS = Explanation(
        "FXF703",
        "the branches are of several dtypes or devices, or in several modes of autocast and autograd",
        "compute all branches in one dtype and in one mode",
    )
    SUM = Explanation(
        "FXF704",
        "they cannot leave the sum: a term is subtracted, or comes too late, or its kind is asked for",
        "add up the branches on one value first, and the rest after them",
    )
    READ = Explanation(
        "FXF705",
        "what one of these branches gives, or a step of it, is used elsewhere too",
        "the other user needs it as it is; nothing to do",
    )

    def reason(self, detail: str = "") -> str:
        """What stands in the way, in words."""
        return f"{self.value.reason}: {detail}" if detail else self.value.reason


def by_code(code: str) -> Code:
    """The member of that code: "FXF101"."""
    return next(each for each in Code if each.value.code == code)
