"""Mesh descriptions, and the meshes made of them."""

import json

import jax
import pytest

from sharding.mesh import AXES, MeshSpec
from sharding.words import counted


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("tensor=8", MeshSpec(tensor=8)),
        ("sequence=4,tensor=2", MeshSpec(sequence=4, tensor=2)),
        (" data = 2 , expert=4,tensor=2,", MeshSpec(data=2, expert=4, tensor=2)),
        ("", MeshSpec()),
    ],
)
def test_descriptions_are_read_and_written(text, spec):
    assert MeshSpec.parse(text) == spec
    assert MeshSpec.parse(str(spec)) == spec


def test_a_file(tmp_path):
    (tmp_path / "mesh.json").write_text(json.dumps({"sequence": 2, "tensor": 8}))
    assert MeshSpec.parse(str(tmp_path / "mesh.json")) == MeshSpec(sequence=2, tensor=8)


def test_tensor_is_the_innermost_axis():
    mesh = MeshSpec(sequence=2, tensor=4).build()
    assert mesh.axis_names == AXES
    assert [device.id for device in mesh.devices[0, 1, 0]] == [4, 5, 6, 7]


def test_a_smaller_mesh_takes_the_first_devices():
    assert [device.id for device in MeshSpec(tensor=2).build().devices.flat] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenser=8", r"has the axis 'tenser' \(did you mean tensor\?\); expected data, sequence, expert, tensor"),
        ("8", r"has the axis '8'; expected data"),
        ("tensor", "has 'tensor'; expected tensor= and a whole number, as in tensor=8"),
        ("tensor=-1", "has 'tensor=-1'; expected tensor= and a whole number"),
        ("tensor=0", "mesh axis tensor is 0; expected a whole number of at least 1"),
        ("tensor=1000001", "mesh axis tensor is 1000001; expected a whole number of at least 1, at most 1000000"),
        (f"tensor={'9' * 5000}", "; expected tensor= and a whole number, as in tensor=8"),
        ("tensor=2,tensor=4", "names tensor twice"),
        ("nowhere.json", "mesh file nowhere.json does not exist"),
    ],
)
def test_bad_descriptions_are_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        MeshSpec.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "holds a list"),
        ('{"tensors": 2}', "did you mean tensor"),
        ('{"tensor": 2.0}', "tensor is 2.0"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "mesh.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        MeshSpec.parse(str(tmp_path / "mesh.json"))
    assert "\n" not in str(error.value)


def test_too_few_devices():
    with pytest.raises(
        ValueError, match=r"mesh sequence=4,tensor=8 has 32 devices, and 8 cpu devices are present; .* JAX_NUM_CPU_DEVICES=32"
    ):
        MeshSpec(sequence=4, tensor=8).build()


def test_one_device_is_not_called_devices():
    with pytest.raises(ValueError, match=r"^mesh tensor=2 has 2 devices, and 1 cpu device is present; on a CPU, "):
        MeshSpec(tensor=2).build(jax.devices()[:1])
    assert [counted(n, "device") for n in (0, 1, 2048)] == ["0 devices", "1 device", "2,048 devices"]
    assert [counted(n, "process is", "processes are") for n in (1, 2)] == ["1 process is", "2 processes are"]


def test_several_processes_must_all_take_part():
    class Device:
        platform = "gpu"

        def __init__(self, process_index):
            self.process_index = process_index

    message = r"mesh tensor=2 has 2 devices, and 4 gpu devices are present in 2 processes; expected all of them$"
    with pytest.raises(ValueError, match=message):
        MeshSpec(tensor=2).build([Device(0), Device(0), Device(1), Device(1)])


def test_there_are_devices_to_test_with():
    assert len(jax.devices()) == 8
