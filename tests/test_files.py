"""Files that nobody vouches for: damaged, hostile, of another model. Outputs that are whole or absent."""

import errno
import io
import json
import os
import pickle
import random
import resource
import stat
import sys
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxfuse.archive import read_program
from fxfuse.checkpoint import load_weights
from fxfuse.container import rebuilt
from fxfuse.errors import UsageError
from fxfuse.files import check_writable, written
from tests.support import randomise

PWNED = Path("pwned")


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(PWNED),)


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def network():
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of an exported program, and what it answers to an input."""
    file = tmp_path_factory.mktemp("saved") / "model.pt2"
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(network(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, file)
    y = torch.randn(5, 3, 6, 6)
    return file.read_bytes(), y, program.module()(y)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def entries_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def edited(content, name, edit):
    """The archive, where `edit` has changed the JSON of an entry."""
    entries = entries_of(content)
    record = json.loads(entries[name])
    edit(record)
    return rebuilt(entries | {name: json.dumps(record).encode()}).getvalue()


def refusal(content, name="hostile.pt2"):
    file = Path(name)
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_program(file)
    assert not PWNED.exists()
    return str(caught.value)


def test_a_program_is_read_as_torch_reads_it(saved):
    content, x, y = saved
    Path("model.pt2").write_bytes(content)
    program = read_program(Path("model.pt2"))
    assert torch.equal(program.module()(x), y)
    expected = torch.export.load("model.pt2")
    assert torch.equal(program.example_inputs[0][0], expected.example_inputs[0][0])
    assert program.state_dict.keys() == expected.state_dict.keys()
    assert str(program.graph) == str(expected.graph)
    assert program.range_constraints == expected.range_constraints


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("expanded", torch.zeros(1).expand(100))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.constant = torch.ones(3)

    def forward(self, target, *, name, mode="same"):
        torch._check(target.shape[2] % 2 == 0)
        with torch.no_grad():
            y = self.norm(self.conv(target))
        y = nn.functional.pad(y, (0, y.shape[2] % 3)).reshape(target.shape[0] * 2, -1)
        z = (
            torch.einsum("bc,bc->b", y, y).sum()
            + self.expanded.sum()
            + self.empty.sum()
            + self.constant.sum()
        )
        z = torch.cond(name["k"][0].sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (z,))
        return {"o": z, "p": torch.vmap(lambda v: v + 1)(y)}


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # the expanded one is none, as torch sees it
@pytest.mark.parametrize("strict", [False, True])
def test_programs_with_guards_keywords_control_flow_and_odd_tensors_are_read(strict):
    x, auto = torch.randn(3, 3, 8, 8), torch.export.Dim.AUTO
    arguments = {"name": {"k": [x]}, "mode": "abc"}
    shapes = {"target": {0: auto, 2: auto, 3: auto}, "name": {"k": [{0: auto}]}, "mode": None}
    program = torch.export.export(Everything().eval(), (x,), arguments, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, "model.pt2")
    found = read_program(Path("model.pt2"))
    for name, value in program.module()(x, **arguments).items():
        assert torch.equal(found.module()(x, **arguments)[name], value)


def test_guards_are_read():
    auto, x = torch.export.Dim.AUTO, torch.randn(3, 3, 8, 8)
    program = torch.export.export(network(), (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch.export.save(program, "model.pt2")
    assert "L['input'].size()[2] >= 3" in program._guards_code
    assert read_program(Path("model.pt2"))._guards_code == program._guards_code


def test_a_truncated_program_is_a_usage_error_wherever_it_ends(saved):
    content = saved[0]
    for length in [0, 1, 4, *range(30, len(content), len(content) // 40), len(content) - 1]:
        assert "copy or download it again" in refusal(content[:length])


def test_a_byte_that_flips_anywhere_is_noticed_or_changes_nothing(saved):
    content, x, y = saved
    generator = random.Random(0)
    flipped = Path("flipped.pt2")
    noticed = 0
    # Most of them in what the program is made of; all of the end, where the archive lists its entries.
    places = [*generator.sample(range(len(content)), 250), *range(len(content) - 90, len(content))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        flipped.write_bytes(damaged)
        try:
            program = read_program(flipped)
        except UsageError as error:
            assert "flipped.pt2" in str(error)
            noticed += 1
        else:
            assert torch.equal(program.module()(x), y), place
    assert noticed > 150


def test_a_weight_with_a_wrong_bit_is_told_by_its_checksum(saved):
    content, *_ = saved
    weight = entries_of(content)["data/weights/weight_0"]
    damaged = content.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1]))
    said = refusal(damaged)
    assert (
        said.startswith("hostile.pt2 is damaged")
        and "Bad CRC-32 for file 'model/data/weights/weight_0'" in said
    )


def named(text):
    """An edit that puts `text` in the place of the name of the input."""

    def edit(record):
        graph, signature = record["graph_module"]["graph"], record["graph_module"]["signature"]
        graph["tensor_values"][text] = graph["tensor_values"].pop("input")
        for argument in (
            graph["inputs"][-1],
            graph["nodes"][0]["inputs"][0]["arg"],
            signature["input_specs"][-1]["user_input"]["arg"],
        ):
            argument["as_tensor"]["name"] = text

    return edit


def first_size(text):
    def edit(record):
        sizes = record["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return edit


def calling(target):
    """An edit that has the last node of the graph call `target` with the name of a file."""

    def edit(record):
        node = record["graph_module"]["graph"]["nodes"][-1]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": str(PWNED)}, "kind": 1}]

    return edit


def structure(**context):
    def edit(record):
        spec = {"type": "builtins.dict", "context": json.dumps([context]), "children_spec": []}
        record["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])

    return edit


def signature(**values):
    return lambda record: record["graph_module"]["module_call_graph"][0]["signature"].update(values)


CALL = f"__import__('os').mkdir('{PWNED}')"
QUOTELESS = f"__import__(chr(111)+chr(115)).mkdir(str(chr(112)+{'+'.join(f'chr({ord(c)})' for c in 'wned')}))"
CODE = {
    "a size": (first_size(CALL), "the expr_str"),
    "a size in a dict": (first_size({"a": QUOTELESS}), "a dict as expr_str"),
    "a text in a size": (first_size(f'Add("{CALL}")'), "the expr_str"),
    "a guard": (lambda record: record.update(guards_code=[f"{QUOTELESS} is None"]), "the guards_code"),
    "the name of an input": (named(f"x={CALL}"), "the name"),
    "the name of an argument": (signature(forward_arg_names=[f"x={CALL}"]), "the forward_arg_names"),
    "a key for a name": (signature(forward_arg_names={f"x={QUOTELESS}": ""}), "a dict as forward_arg_names"),
    "an operator": (calling("torch.os.mkdir"), "the target 'torch.os.mkdir'"),
    "a structure": (structure(__enum__=True, fqn="evil:A.B", name="C"), "the out_spec"),
}


# With these torch alone does what they say, which shows that they are attacks.
DEEDS = {"a size", "a guard", "the name of an input", "a structure"}


@pytest.mark.parametrize("attack", CODE)
def test_a_program_cannot_bring_code(saved, attack):
    content, x, _ = saved
    edit, said = CODE[attack]
    Path("evil.py").write_text(f"import os; os.mkdir({str(PWNED)!r})")
    sys.path.insert(0, str(Path.cwd()))
    try:
        hostile = edited(content, "models/model.json", edit)
        message = refusal(hostile)
        assert message.startswith(f"hostile.pt2 is not loaded: it has {said}")
        assert "could run code of others" in message and "save the program again" in message
        if attack in DEEDS:
            with suppress(Exception):  # after the deed
                torch.export.load("hostile.pt2").module()(x)
            assert PWNED.exists()
    finally:
        sys.path.remove(str(Path.cwd()))
        sys.modules.pop("evil", None)


def payload(kind):
    """An edit of the entries of an archive that has it unpickle a Payload."""

    def edit(entries):
        hostile = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        if kind == "inputs":
            entries["data/sample_inputs/model.pt"] = pickled(((Payload(),), {}))
        elif kind == "weights":
            name = "data/weights/model_weights_config.json"
            config = json.loads(entries[name])
            config["config"]["0.weight"]["use_pickle"] = True
            entries[name] = json.dumps(config).encode()
            entries["data/weights/weight_0"] = pickled(Payload())
        elif kind == "objects":
            name = "data/constants/model_constants_config.json"
            entries[name] = json.dumps({"config": {"a": hostile}}).encode()
            entries["data/constants/opaque_obj_0"] = pickle.dumps(Payload())
        else:
            entries["data/weights/model.pt"] = pickled(Payload())

    return edit


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("inputs", "its example inputs are pickled objects"),
        ("weights", "its tensor '0.weight' is a pickled object"),
        ("objects", "it has an entry 'data/constants/opaque_obj_0'"),
        ("legacy weights", "it has an entry 'data/weights/model.pt'"),
    ],
)
def test_nothing_in_a_program_is_unpickled(saved, kind, said):
    entries = entries_of(saved[0])
    payload(kind)(entries)
    message = refusal(rebuilt(entries).getvalue())
    assert f"hostile.pt2 is not loaded: {said}" in message and "from a source that you trust" in message
    with suppress(Exception):  # after the deed
        torch.export.load("hostile.pt2")
    assert PWNED.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../../outside", "it has an entry '../../outside'"),
        ("data/aotinductor/model/library.so", "it has an entry 'data/aotinductor/model/library.so'"),
        ("serialized_exported_program.json", "it has an old format of torch"),
        ("models/other.json", "it has an entry 'models/other.json'"),
    ],
)
def test_an_entry_that_is_no_part_of_a_program_is_refused(saved, name, said):
    entries = entries_of(saved[0]) | {name: b"{}"}
    assert f"not loaded: {said}" in refusal(rebuilt(entries).getvalue())


def test_a_zip_file_that_is_no_program_is_refused_without_the_noise_of_torch(capfd, caplog):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("folder/readme", "nothing")
    assert "it has an entry 'readme'" in refusal(file.getvalue())
    assert "it is no exported program, for it has no entry '.data/version'" in refusal(
        rebuilt({"byteorder": b""}).getvalue()
    )
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.pop("graph_module"),
        lambda record: record["graph_module"]["graph"].update(nodes=[1]),
        lambda record: record["graph_module"]["graph"]["nodes"][0].update(
            target="torch.ops.aten.absent.default"
        ),
        lambda record: record["schema_version"].update(major=99),
    ],
)
def test_a_program_that_torch_cannot_read_is_a_usage_error(saved, edit, capfd):
    said = refusal(edited(saved[0], "models/model.json", edit))
    assert "hostile.pt2" in said and ("export it again" in said or "torch.ops.aten.absent.default" in said)
    assert "Traceback" not in "".join(capfd.readouterr())


def declaring(content, size):
    """The archive, whose list says that its last entry has `size` bytes."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/extra/note", b"short")
        archive.filelist[-1].file_size = archive.filelist[-1].compress_size = size
    return file.getvalue()


def limited(limit=2**30):
    """No test may take more memory than it has plus `limit`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))


@pytest.fixture
def little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    limited()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_bombs_are_refused_before_they_are_unpacked(saved):
    content, *_ = saved
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("model/data/weights/weight_0", bytes(2**24))
    said = refusal(file.getvalue())
    assert "its entry 'model/data/weights/weight_0' is compressed" in said and "16777216" in said
    lie = declaring(content, 10 * 2**30)
    assert f"bytes, more than the {len(lie)} of the file" in refusal(lie)
    assert "damaged" in refusal(declaring(content, 1))


def test_overlapping_entries_are_refused():
    """Many names for one long entry: each of them is small, all of them are not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/a", bytes(10_000))
        archive.filelist *= 50
        archive.NameToInfo |= {str(number): archive.filelist[0] for number in range(50)}
    assert "more than the" in refusal(file.getvalue())


def test_two_entries_of_one_name_are_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/a", b"1")
        archive.writestr("other/a", b"2")
    assert "entries have the same name" in refusal(file.getvalue())


def sized(size, record):
    record["config"]["0.bias"]["tensor_meta"]["sizes"] = [size]


def test_a_small_tensor_cannot_declare_to_be_a_large_one(saved):
    def edit(record):
        record["config"]["0.weight"]["tensor_meta"]["sizes"][0] = {"as_int": 2**40}
        record["config"]["0.weight"]["tensor_meta"]["strides"] = [{"as_int": 0}] * 4

    name = "data/weights/model_weights_config.json"
    said = refusal(edited(saved[0], name, edit))
    for size in ({"as_int": "3"}, 3, {}, [], {"as_expr": {"expr_str": "3"}}):
        odd = edited(saved[0], name, partial(sized, size))
        assert "its tensor '0.bias' has a size" in refusal(odd)
    assert f"its tensor '0.weight' has {2**40 * 27} elements in 432 bytes" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "it does not list its tensors"),
        ('{"config": []}', "it does not list its tensors"),
        ('{"config": {"a": []}}', "its tensor 'a' is a pickled object"),
        ("no JSON", "is no JSON"),
        *(
            (f"{'[' * depth}{']' * depth}", "hostile.pt2 is not loaded")
            for depth in (*range(800, 1000, 3), 100_000)
        ),
    ],
)
def test_lists_of_tensors_that_are_none_are_refused(saved, text, said):
    entries = entries_of(saved[0]) | {"data/weights/model_weights_config.json": text.encode()}
    assert said in refusal(rebuilt(entries).getvalue())


# Weights


def checkpoint(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stored(tensors, name):
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, name)
    return Path(name)


def rejected(model, path):
    with pytest.raises(UsageError) as caught:
        load_weights(model, path)
    assert not PWNED.exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "W.PT"])
def test_weights_come_out_of_a_file(name):
    source, model = network(), network()
    tensors = checkpoint(source)
    assert load_weights(model, stored(tensors, name)) == f"from {name}"
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_weights_in_a_checkpoint_of_a_training_loop_are_found(key):
    tensors = checkpoint(network())
    model = network()
    load_weights(model, stored({key: tensors, "epoch": 3}, "w.pt"))
    assert torch.equal(model[0].weight, tensors["0.weight"])


def test_a_counter_of_batches_may_be_missing_and_broken_numbers_are_told():
    tensors = checkpoint(network())
    del tensors["1.num_batches_tracked"]
    tensors["1.bias"][0], tensors["0.bias"][1] = torch.nan, torch.inf
    said = load_weights(network(), stored(tensors, "w.safetensors"))
    assert said == "from w.safetensors, 2 of 7 tensors hold NaN or infinity"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_what_does_not_fit_is_listed_with_names_and_shapes(name):
    tensors = checkpoint(network())
    tensors["0.weight"] = torch.zeros(4, 3, 5, 5)
    tensors |= {f"extra.{number}": torch.zeros(1) for number in range(5)}
    del tensors["1.running_var"]
    assert rejected(network(), stored(tensors, name)) == (
        f"{name} does not fit Sequential: 1 missing: 1.running_var; "
        "5 unexpected: extra.0, extra.1, extra.2 and 2 more; "
        "1 of another shape: 0.weight (4, 3, 5, 5) where the model has (4, 3, 3, 3). "
        "With these weights it would compute something else; name the architecture that they were saved from"
    )


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_truncated_or_damaged_weights_are_a_usage_error(name):
    path = stored(checkpoint(network()), name)
    content = path.read_bytes()
    for length in (0, 3, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        said = rejected(network(), path)
        assert name in said and "again" in said


def test_a_wrong_bit_in_pickled_weights_is_told_by_its_checksum():
    tensors = checkpoint(network())
    path = stored(tensors, "w.pt")
    weight = tensors["0.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    assert "Bad CRC-32" in rejected(network(), path)


@pytest.mark.parametrize("value", [Payload(), {"a": Payload()}, network(), {"state_dict": {"a": Payload()}}])
def test_pickled_objects_are_refused_with_what_to_do(value):
    said = rejected(network(), stored(value, "w.pt"))
    assert "holds Python objects" in said and "torch.save(model.state_dict(), FILE)" in said
    Path("w.pth").write_bytes(pickle.dumps(value))
    assert "torch.save(model.state_dict(), FILE)" in rejected(network(), Path("w.pth"))
    Path("w.safetensors").write_bytes(pickle.dumps(value))
    assert "w.safetensors is no safetensors file" in rejected(network(), Path("w.safetensors"))


@pytest.mark.parametrize("value", [[torch.zeros(1)], torch.zeros(1), {"a": 1}])
def test_values_that_are_no_tensors_by_name_are_refused(value):
    assert "and not tensors by name" in rejected(network(), stored(value, "w.pt"))


def test_weights_need_a_file_with_a_name_that_says_what_it_is():
    assert rejected(network(), Path("absent.pt")) == f"there is no file absent.pt, seen from {Path.cwd()}"
    Path("w.npz").write_bytes(b"")
    assert "those end in .safetensors, .pt, .pth, .bin" in rejected(network(), Path("w.npz"))


def test_files_that_cannot_be_opened_are_usage_errors(saved, monkeypatch):
    long = "x" * 300
    for read in (read_program, lambda path: load_weights(network(), path)):
        with pytest.raises(UsageError, match=r"xxx\.pt cannot be read: File name too long"):
            read(Path(f"{long}.pt"))
    with pytest.raises(UsageError, match=r"cannot write xxx.*: File name too long"):
        check_writable(Path(long), kept=[])

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    Path("model.pt2").write_bytes(saved[0])
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UsageError, match=r"model\.pt2 cannot be read: Permission denied"):
        read_program(Path("model.pt2"))


# Outputs


def names():
    return sorted(path.name for path in Path.cwd().iterdir())


def test_a_file_is_written_with_the_permissions_that_open_gives():
    old = os.umask(0o027)
    try:
        Path("plain").write_text("")
        with written(Path("new")) as part:
            part.write_text("new")
        assert Path("new").stat().st_mode == Path("plain").stat().st_mode
        Path("new").chmod(0o604)
        with written(Path("new")) as part:
            part.write_text("newer")
        assert stat.S_IMODE(Path("new").stat().st_mode) == 0o604 and Path("new").read_text() == "newer"
        assert names() == ["new", "plain"]
    finally:
        os.umask(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_write_leaves_nothing_and_the_old_file_as_it_was(error):
    Path("old").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(error), written(Path(name)) as part:
            part.write_text("half")
            raise error
    assert names() == ["old"] and Path("old").read_text() == "old"


def test_a_link_is_followed_into_its_folder():
    Path("folder").mkdir()
    Path("link").symlink_to("folder/file")
    with written(Path("link")) as part:
        assert part.parent.parent == Path("folder").resolve()
        part.write_text("text")
    assert Path("link").is_symlink() and Path("folder/file").read_text() == "text"


def test_a_full_disk_is_a_usage_error_that_leaves_nothing():
    told = pytest.raises(UsageError, match=r"cannot write new: No space left on device\. Nothing was written")
    with told, written(Path("new")) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names() == []


def test_a_folder_that_takes_no_files_is_a_usage_error():
    with pytest.raises(UsageError, match="cannot write /proc/new: "), written(Path("/proc/new")):
        pytest.fail("there is nothing to write to")


def test_a_file_that_is_read_cannot_be_written_under_any_of_its_names():
    Path("model.pt2").write_text("")
    Path("soft.pt2").symlink_to("model.pt2")
    Path("hard.pt2").hardlink_to("model.pt2")
    for name in ("model.pt2", "./model.pt2", "soft.pt2", "hard.pt2"):
        with pytest.raises(UsageError, match=r"it is the same file as model\.pt2, which would be lost"):
            check_writable(Path(name), kept=[Path("model.pt2")])
    check_writable(Path("other.pt2"), kept=[Path("model.pt2"), Path("absent.pt2")])
    check_writable(Path("absent.pt2"), kept=[Path("absent.pt2")])
